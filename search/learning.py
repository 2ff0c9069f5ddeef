"""Methods that learn: once per sweep, as Ray tasks, kept beside the results by what they saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from safetensors.torch import save

from pruners import PrunableViT
from pruners.gates import LearningData
from pruners.learned import Learned, LearnedPruner
from search.parquet import Images
from search.progress import HEARTBEAT_S
from search.space_step import Rung, SpaceStep
from search.sweep import Sweep, SweepFailedError
from search.trial import open_split, trial_device

FOLDER = "learned"
"""Folder of a sweep's storage that holds what methods have learned; all sweeps there share it."""


@dataclass(frozen=True, kw_only=True)
class LearningRun:
    """What came of one run.

    Attributes:
        label: The step's.
        budget: Share of the dense cost that was learned for; None if the method needs none.
        path: File of what was learned.
        report: Figures of the run; `seconds` is what it took, whenever that was.
        reused: Whether an earlier sweep had learned the same.
    """

    label: str
    budget: float | None
    path: str
    report: dict[str, float]
    reused: bool

    def describe(self) -> str:
        """Say it in one line."""
        what = self.label + (f" for {self.budget:.2f}x" if self.budget is not None else "")
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.report.items() if k != "seconds")
        how = "learned before" if self.reused else f"learned in {self.report['seconds']:.0f} s"
        return f"{what}: {how}" + (f" ({figures})" if figures else "")


def learn_all(
    sweep: Sweep,
    dense: PrunableViT,
    steps: tuple[SpaceStep, ...],
    ended: Callable[[LearningRun], None],
    waiting: Callable[[list[str]], None],
) -> dict[str, list[Rung]]:
    """Let every step that learns do so, side by side as far as the cluster has room.

    Args:
        sweep: The sweep.
        dense: The dense model, on the CPU.
        steps: The steps of the space.
        ended: Told of each run that has ended.
        waiting: Told now and then whose runs have not.

    Returns:
        Label -> what was learned, for each of the step's budgets.

    Raises:
        SweepFailedError: If a run fails.
    """
    learn = ray.remote(learn_once).options(
        num_cpus=sweep.resources.cpu, num_gpus=sweep.resources.gpu, max_retries=sweep.max_failures
    )
    shared, folder = ray.put(dense), Path(sweep.storage).resolve() / FOLDER
    pending = {
        learn.remote(sweep, shared, step.label, pruner, folder): (step.label, pruner)
        for step in steps
        for pruner in step.learners()
    }
    rungs: dict[str, list[Rung]] = {}
    while pending:
        done, _ = ray.wait(list(pending), timeout=HEARTBEAT_S)
        for task in done:
            label, pruner = pending.pop(task)
            run = _result(task, label)
            ended(run)
            scores = Learned.load(Path(run.path)).scores
            rungs.setdefault(label, []).append(Rung(pruner=pruner, scores=scores, path=run.path))
        if not done:
            waiting(sorted({label for label, _ in pending.values()}))
    return rungs


def _result(task: ray.ObjectRef[LearningRun], label: str) -> LearningRun:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise SweepFailedError(f"{label} could not learn: {cause}") from error


def learn_once(
    sweep: Sweep, dense: PrunableViT, label: str, pruner: LearnedPruner, folder: Path
) -> LearningRun:
    """Learn, or find what was learned from the same; an interrupted run goes on where it ended."""
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    device = trial_device(sweep)
    train, val = (open_split(sweep, dense, split) for split in ("train", "val"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pruner.name}-{identity(sweep, dense, pruner, train, val)[:24]}.safetensors"
    reused = path.exists()
    if reused:
        learned = Learned.load(path)
    else:
        state = path.with_suffix(".part")
        vit = dense.to(device)
        learned = pruner.learn(vit, learning_data(sweep, train, val, device), state)
        learned.save(path)
        state.unlink(missing_ok=True)
    return LearningRun(
        label=label,
        budget=getattr(pruner, "budget", None) if pruner.learns_for_a_budget() else None,
        path=str(path),
        report=dict(learned.report),
        reused=reused,
    )


def identity(
    sweep: Sweep, dense: PrunableViT, pruner: LearnedPruner, train: Images, val: Images
) -> str:
    """SHA-256 of everything that decides what is learned: method, model, images, their order."""
    tensors = {key: value.cpu().contiguous() for key, value in dense.vit.state_dict().items()}
    decisive = {
        "method": pruner.name,
        "options": pruner.options(),
        "shape": dense.shape().to_json(),
        "weights": hashlib.sha256(save(tensors)).hexdigest(),
        "train": train.digest,
        "val": val.digest,
        "batch_size": sweep.data.batch_size,
        "augment": sweep.finetune.augment,
        "seed": sweep.seed,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


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
