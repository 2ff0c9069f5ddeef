"""The elastic start: the dense model is tuned once so that it survives the cuts of its sweep.

Each step trains, on one batch, models that share the dense weights: the dense model, the smallest
plan and two plans of the sweep's own space; the gradients are averaged. That is the sandwich rule
(Yu & Huang, 2019, "Universally Slimmable Networks", arXiv:1903.05134) over plans as sub-networks
(Cai et al., 2020, "Once-for-All", arXiv:1908.09791).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
from torch import Tensor

from pruners import Plan, PrunableViT, Pruner
from pruners.checkpoint import SHAPE, read_description
from pruners.families.learned import Learned
from pruners.model.types import Scores
from pruners.model.vit import ViT
from pruners.subnet import Subnet, shared_scores
from pruners.training.evaluation import evaluate
from pruners.training.learner import Learner, LearningData, run
from pruners.training.optimisation import (
    autocast,
    clip_and_step,
    decayed,
    distillation,
    schedule_factor,
    set_lr,
)
from pruners.training.recipe import Recipe
from search.data.images import Images
from search.data.splits import calibration_batches, open_split, trial_device
from search.prepare.learning import learning_data
from search.prepare.task import cause_of, worker_task
from search.records.digests import json_digest, tensors_digest
from search.report.progress import HEARTBEAT_S
from search.sweep.spec import Sweep, SweepFailedError

FOLDER = "elastic"
"""Folder of a sweep's storage that holds tuned dense models; all sweeps there share it."""

REPORT = {"epochs", "dense_before", "dense_after", "seconds"}
"""Keys of the report in a tuned model's description."""

PASSES = 4
"""Models that are run forward and backward in a step: dense, smallest, and two plans."""


@dataclass(frozen=True, kw_only=True)
class ElasticStart:
    """The plans that the dense model is tuned for, and for how long.

    Attributes:
        epochs: Passes over the training images; each runs four models.
        smallest: The plan that is trained in every step.
        plans: Plans of the sweep's space; two are trained in each step, in this order, over again.
        learned: Scores of the dense model, and weights learned with them. A method whose cuts start
            from learned weights is refused.
    """

    epochs: int
    smallest: Plan
    plans: tuple[Plan, ...]
    learned: Mapping[Pruner, Learned] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.epochs < 1:
            raise ValueError(f"epochs of an elastic start are {self.epochs}; give at least 1")
        if not self.plans:
            raise ValueError("an elastic start has no plans; give at least one")


class Sandwich(Learner):
    """Trains the dense weights on four models at once.

    The dense model's loss is that of fine-tuning, with the model as it was as teacher; the smaller
    models learn the answers of the dense model, as it is, by the divergence alone.
    """

    def __init__(
        self,
        vit: PrunableViT,
        recipe: Recipe,
        steps_per_epoch: int,
        start: ElasticStart,
        scores: Mapping[Pruner, Scores],
    ) -> None:
        """Prepare the optimiser and the smallest model.

        Args:
            vit: A copy of the dense model, which is trained.
            recipe: How it is tuned, over all epochs.
            steps_per_epoch: Training batches of an epoch.
            start: Plans.
            scores: Method -> its scores of the dense model.
        """
        super().__init__(vit, distils=recipe.distill > 0.0, precision=recipe.precision)
        self.recipe, self.start, self.scores = recipe, start, scores
        self.steps, self.total = steps_per_epoch, max(1, recipe.epochs * steps_per_epoch)
        groups = decayed(vit.parameters(), recipe.weight_decay)
        self.adam = torch.optim.AdamW(groups, lr=recipe.lr)
        self.optimizers = {"weights": self.adam}
        self.smallest = Subnet(vit, start.smallest, scores)

    def begin_epoch(self, epoch: int) -> None:
        """Go on with the step behind the epochs before."""
        self.done = epoch * self.steps

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train on a batch and return the mean loss of the four models."""
        self.adam.zero_grad(set_to_none=True)
        logits = self._logits(self.vit, images)
        loss = self.recipe.loss(logits, labels, self.teach(images)) / PASSES
        loss.backward()
        total = loss.detach()
        for subnet in self._subnets():
            subnet.vit.train()
            answers = self._logits(subnet.vit, images)
            loss = distillation(answers, logits.detach(), self.recipe.temperature) / PASSES
            loss.backward()
            subnet.collect()
            total = total + loss.detach()
        factor = schedule_factor(self.done, self.total, self.recipe.warmup)
        set_lr(self.adam, self.recipe.lr * factor)
        clip_and_step([self.adam], self.vit.parameters(), norm=self.recipe.clip)
        self.done += 1
        return total

    def _subnets(self) -> list[Subnet]:
        plans = self.start.plans
        self.smallest.refresh()
        drawn = [plans[(2 * self.done + i) % len(plans)] for i in range(PASSES - 2)]
        return [self.smallest, *(Subnet(self.vit, plan, self.scores) for plan in drawn)]

    def _logits(self, vit: ViT, images: Tensor) -> Tensor:
        with autocast(self.device, self.autocast):
            return vit(images).float()


@dataclass(frozen=True, kw_only=True)
class ElasticRun:
    """One run of an elastic start.

    Attributes:
        path: Directory of the tuned dense model; `PrunableViT.load` opens it.
        report: `epochs`, passes of one model over the training images, for comparisons with
            fine-tuning; `dense_before` and `dense_after`, top-1 on validation images in percent;
            `seconds`, its duration, in whatever sweep it ran; of a resumed run, its last part.
        reused: Whether an earlier sweep had tuned the same.
    """

    path: str
    report: dict[str, float]
    reused: bool

    def describe(self) -> str:
        """Return the run in one line."""
        report = self.report
        how = "tuned before" if self.reused else f"tuned in {report['seconds']:.0f} s"
        return (
            f"elastic start: {how}, as much as {report['epochs']:.0f} epochs of one model "
            f"(dense {report['dense_before']:.1f} -> {report['dense_after']:.1f} %)"
        )


def tune_elastic(
    sweep: Sweep, dense: PrunableViT, start: ElasticStart, waiting: Callable[[], None]
) -> ElasticRun:
    """Tune the dense model as a Ray task, or find the one that was tuned from the same.

    Args:
        sweep: The sweep.
        dense: The dense model, on the CPU.
        start: What it is tuned for.
        waiting: Told now and then that the task still runs.

    Raises:
        SweepFailedError: If it fails.
    """
    tune = worker_task(sweep, tune_once)
    task = tune.remote(sweep, dense, start, Path(sweep.storage).resolve() / FOLDER)
    while not ray.wait([task], timeout=HEARTBEAT_S)[0]:
        waiting()
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        raise SweepFailedError(f"the elastic start failed: {cause_of(error)}") from error


def tune_once(sweep: Sweep, dense: PrunableViT, start: ElasticStart, folder: Path) -> ElasticRun:
    """Tune, or reuse the result of the same inputs; an interrupted run resumes.

    Raises:
        ValueError: If a method's models cannot share the dense weights.
    """
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    device = trial_device(sweep)
    train, val = (open_split(sweep, dense, split) for split in ("train", "val"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"elastic-{elastic_digest(sweep, dense, start, train, val)[:24]}"
    reused = (path / SHAPE).exists()  # written last
    if not reused:
        vit, began, state = dense.to(device), time.perf_counter(), path.with_suffix(".part")
        calibration = list(calibration_batches(sweep, train, device))
        data = learning_data(sweep, train, val, device)
        with torch.random.fork_rng():
            tuned = _tune(sweep, vit, start, calibration, data, state)
        report = {
            "epochs": float(PASSES * start.epochs),
            "dense_before": evaluate(vit, data.val()).top1,
            "dense_after": evaluate(tuned, data.val()).top1,
            "seconds": time.perf_counter() - began,
        }
        tuned.save(path, measured=report)
        state.unlink(missing_ok=True)
    found = read_description(path).get("measured")
    if not isinstance(found, dict) or REPORT - found.keys():
        raise ValueError(f"{path / SHAPE} reports {found!r}; remove {path}, to tune again")
    return ElasticRun(path=str(path), report=found, reused=reused)


def _tune(
    sweep: Sweep,
    dense: PrunableViT,
    start: ElasticStart,
    calibration: list[tuple[Tensor, Tensor]],
    data: LearningData,
    state: Path,
) -> PrunableViT:
    torch.manual_seed(sweep.seed)
    plans = [start.smallest, *start.plans]
    scores = shared_scores(dense, plans, calibration, start.learned)
    finetune = sweep.finetune.model_dump(exclude={"augment", "lr"})
    recipe = Recipe(epochs=start.epochs, lr=sweep.elastic_lr, **finetune)
    own = copy.deepcopy(dense).requires_grad_(True)
    own.use_fused_attention(next(own.parameters()).is_cuda)
    run(Sandwich(own, recipe, data.steps, start, scores), data, start.epochs, sweep.seed, state)
    return own


def elastic_digest(
    sweep: Sweep, dense: PrunableViT, start: ElasticStart, train: Images, val: Images
) -> str:
    """Return the SHA-256 of all inputs of the tuned weights and their report."""
    learned = {
        json.dumps([pruner.name, pruner.options()], sort_keys=True): tensors_digest(found.scores)
        for pruner, found in start.learned.items()
    }
    decisive = {
        "epochs": start.epochs,
        "smallest": start.smallest.to_json(),
        "plans": [plan.to_json() for plan in start.plans],
        "learned": learned,
        "shape": dense.shape().to_json(),
        "weights": tensors_digest(dense.vit.state_dict()),
        "train": train.digest,
        "val": val.digest,
        "batch_size": sweep.data.batch_size,
        "calibration": sweep.data.calibration,
        "finetune": sweep.finetune.model_dump(mode="json"),
        "lr": sweep.elastic_lr,
        "seed": sweep.seed,
    }
    return json_digest(decisive)
