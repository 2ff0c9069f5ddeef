"""Learning and scoring of the dense model: once per method and sweep, as Ray tasks.

Results are kept beside the sweeps by a digest of all their inputs, so other sweeps reuse them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from pruners import PrunableViT, Pruner
from pruners.families.learned import Learned, LearnedPruner
from pruners.training.learner import LearningData
from search.data.images import Images
from search.data.splits import calibration_batches, open_split, trial_device
from search.prepare.task import cause_of, worker_task
from search.records.digests import json_digest, tensors_digest
from search.report.progress import HEARTBEAT_S
from search.space.allocation import Allocation, own_allocation
from search.space.step import Rung, SpaceStep
from search.sweep.spec import Sweep, SweepFailedError

FOLDER = "learned"
"""Folder of a sweep's storage with scores and learned weights; all sweeps there share it."""


@dataclass(frozen=True, kw_only=True)
class LearningRun:
    """One method's run of learning or scoring.

    Attributes:
        label: The step's.
        budget: Share of the dense cost that was learned for; None if the method needs none.
        path: File of scores and learned weights; empty for a method without either.
        report: Figures of the run; `seconds` is its duration, in whatever sweep it ran.
        reused: Whether an earlier sweep had learned the same.
        learns: Whether it was more than scoring.
    """

    label: str
    budget: float | None
    path: str
    report: dict[str, float]
    reused: bool
    learns: bool

    def describe(self) -> str:
        """Return the run in one line."""
        what = self.label + (f" for {self.budget:.2f}x" if self.budget is not None else "")
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.report.items() if k != "seconds")
        verb = "learned" if self.learns else "scored"
        how = f"{verb} before" if self.reused else f"{verb} in {self.report['seconds']:.0f} s"
        return f"{what}: {how}" + (f" ({figures})" if figures else "")


def learn_all(
    sweep: Sweep,
    dense: PrunableViT,
    steps: tuple[SpaceStep, ...],
    ended: Callable[[LearningRun], None],
    waiting: Callable[[list[str]], None],
) -> dict[str, list[Rung]]:
    """Let every step learn, or score the dense model, side by side as far as there is room.

    Args:
        sweep: The sweep.
        dense: The dense model, on the CPU.
        steps: The steps of the space.
        ended: Called with each run that has ended.
        waiting: Called now and then with the labels of the others.

    Returns:
        Label -> measurements of the step's method, one for each of its budgets.

    Raises:
        SweepFailedError: If a run fails.
    """
    learn = worker_task(sweep, learn_once)
    shared, folder = ray.put(dense), Path(sweep.storage).resolve() / FOLDER
    pending = {
        learn.remote(sweep, shared, step, pruner, folder): (step.label, pruner)
        for step in steps
        for pruner in _methods(step)
    }
    rungs: dict[str, list[Rung]] = {}
    while pending:
        done, _ = ray.wait(list(pending), timeout=HEARTBEAT_S)
        for task in done:
            label, pruner = pending.pop(task)
            run, own = _result(task, label, pruner)
            ended(run)
            rungs.setdefault(label, []).append(Rung(pruner=pruner, own=own, path=run.path))
        if not done:
            waiting(sorted({label for label, _ in pending.values()}))
    return rungs


def _methods(step: SpaceStep) -> list[Pruner]:
    return [*step.learners()] or [step.pruner]


def _result(
    task: ray.ObjectRef[tuple[LearningRun, Allocation]], label: str, pruner: Pruner
) -> tuple[LearningRun, Allocation]:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        verb = "learn" if isinstance(pruner, LearnedPruner) else "score the dense model"
        raise SweepFailedError(f"{label} could not {verb}: {cause_of(error)}") from error


def learn_once(
    sweep: Sweep, dense: PrunableViT, step: SpaceStep, pruner: Pruner, folder: Path
) -> tuple[LearningRun, Allocation]:
    """Learn or score, or reuse the result of the same inputs, and measure own allocations.

    An interrupted run resumes.
    """
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    device = trial_device(sweep)
    learns = isinstance(pruner, LearnedPruner)
    train = open_split(sweep, dense, "train")
    val = open_split(sweep, dense, "val") if learns else train
    folder.mkdir(parents=True, exist_ok=True)
    digest = learning_digest(sweep, dense, pruner, train, val)
    path = folder / f"{pruner.name}-{digest[:24]}.safetensors"
    reused = path.exists()
    if reused:
        learned = Learned.load(path)
    elif isinstance(pruner, LearnedPruner):
        state = path.with_suffix(".part")
        data = learning_data(sweep, train, val, device)
        learned = pruner.learn(dense.to(device), data, state)
        learned.save(path)
        state.unlink(missing_ok=True)
    else:
        start = time.perf_counter()
        batches = list(calibration_batches(sweep, train, device))
        scores = pruner.score(dense.to(device), batches)
        learned = Learned(scores=scores, report={"seconds": time.perf_counter() - start})
        if scores:
            learned.save(path)
    for_budget = isinstance(pruner, LearnedPruner) and pruner.learns_for_a_budget()
    run = LearningRun(
        label=step.label,
        budget=getattr(pruner, "budget", None) if for_budget else None,
        path=str(path) if learned.scores else "",
        report=dict(learned.report),
        reused=reused,
        learns=learns,
    )
    return run, own_allocation(pruner, dense.shape(), learned.scores, step.max_share)


def learning_digest(
    sweep: Sweep, dense: PrunableViT, pruner: Pruner, train: Images, val: Images
) -> str:
    """Return the SHA-256 of all inputs of learning: method, model, images, their order."""
    decisive = {
        "method": pruner.name,
        "options": pruner.options(),
        "shape": dense.shape().to_json(),
        "weights": tensors_digest(dense.vit.state_dict()),
        "train": train.digest,
        "val": val.digest,
        "batch_size": sweep.data.batch_size,
        "calibration": sweep.data.calibration,
        "augment": sweep.finetune.augment,
        "seed": sweep.seed,
    }
    return json_digest(decisive)


def learning_data(sweep: Sweep, train: Images, val: Images, device: torch.device) -> LearningData:
    """Return a sweep's images to learn on: training images; validation images for choices."""
    data = sweep.data
    return LearningData(
        train=lambda epoch: train.batches(
            data.batch_size,
            seed=sweep.seed * 1_009 + epoch,
            augment=sweep.finetune.augment,
            device=device,
        ),
        val=lambda: val.batches(data.eval_batch_size, seed=None, augment=False, device=device),
        steps=max(1, len(train) // data.batch_size),
    )
