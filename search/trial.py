"""One trial: apply the plan to the dense model, report, fine-tune epoch by epoch."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import Tensor

from pruners import Plan, PrunableViT, cost_of
from pruners.evaluation import Evaluation, evaluate, measured_rate
from pruners.learned import Learned
from pruners.training import FineTuner, NonFiniteLossError, Recipe
from search.augment import Epoch
from search.node_model import Packed, pack, unpack
from search.sweep import Sweep
from search.trial_data import Calibration, make_teacher, mixed_seed, open_split, trial_device
from search.trial_files import Saved, TrialFiles

LATENCY_BATCHES = 5
"""Batches that a model's speed is the median of; one more before them warms up."""


@dataclass(frozen=True, kw_only=True)
class TrialInputs:
    """What all trials of a sweep share; Ray keeps it once per node, weights included.

    Attributes:
        sweep: The sweep.
        dense: The dense model, on the CPU; its weights must not be changed in place.
        start: The model that plans cut, of the same shape: the dense one, or the dense one tuned
            for cuts.
        directory: The sweep's, which all nodes see under this path.
    """

    sweep: Sweep
    dense: PrunableViT
    start: PrunableViT
    directory: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights in a way that they are not copied into each process."""
        start = None if self.start is self.dense else pack(self.start)
        return _inputs, (self.sweep, pack(self.dense), start, self.directory)


Apart = tuple[PrunableViT, dict[str, Packed]]
"""A model without its weights, and these."""


def _inputs(sweep: Sweep, dense: Apart, start: Apart | None, directory: Path) -> TrialInputs:
    whole = unpack(*dense)
    begin = unpack(*start) if start else whole
    return TrialInputs(sweep=sweep, dense=whole, start=begin, directory=directory)


class PlanTrial(tune.Trainable):
    """A trial as Ray Tune runs it: a step is an epoch; the first cuts and measures, untrained.

    The actor is reused from trial to trial, so that torch is imported and the data opened only
    once. All trials see the same images in the same epoch, in the same order. Every random number
    depends on (the sweep's seed, the configuration's `seed`, trial, epoch) alone, so a resumed
    trial goes on as if nothing had happened; another `seed` in the configuration, 0 by default,
    trains the same plan on another stream of images.

    What it comes to is saved after each epoch (`search.trial_files`). A trial that starts anew,
    since its actor or the whole sweep died, first reports again what was saved: the driver may not
    have heard all of it.
    """

    vit: PrunableViT
    tuner: FineTuner
    epoch: int
    seconds: float
    latency_ms: float

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        """Prepare the actor, then the first trial."""
        if inputs is None:
            raise ValueError("inputs is None; give TrialInputs through tune.with_parameters")
        self.sweep, self.directory = inputs.sweep, inputs.directory
        torch.set_num_threads(max(1, int(self.sweep.resources.cpu)))
        self.device = trial_device(self.sweep)
        self.dense = inputs.dense.eval().requires_grad_(False)
        self.start = inputs.start.eval().requires_grad_(False)
        for vit in (self.dense, self.start):
            vit.use_fused_attention(self.device.type == "cuda")
        self.train_images = open_split(self.sweep, self.dense, "train")
        self.val_images = open_split(self.sweep, self.dense, "val")
        self.calibration = Calibration(self.sweep, self.train_images, self.device)
        self.teacher = make_teacher(self.sweep, self.dense, self.train_images, self.device)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare the next trial on the same actor."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Run one epoch and return its metrics; the last result of a trial has `done`."""
        if self.repeats:
            return self.repeats.pop(0)
        start = time.perf_counter()
        status, reason, loss = "running", "", 0.0
        try:
            if self.epoch < 0:
                self._cut()
            else:
                self.plan.ramp(self.vit, self.calibration, self.epoch + 1)
                loss = self.tuner.train_taught(self._train_batches())
            self.measured = evaluate(self.vit, self._val_batches())
            if self.epoch < 0:
                self.latency_ms = self._latency_ms()
                reason = self._too_slow()
                status = "stopped" if reason else status
        except NonFiniteLossError as error:
            status, reason = "failed", f"epoch {self.epoch + 1}: {error}"
        self.epoch += 1
        if status == "running" and self.epoch >= self.config["epochs"]:
            status = "finished"
        self.seconds += time.perf_counter() - start
        self.results.append(self._result(status, reason, loss))
        if status != "failed":
            tuner = self.tuner.state_dict() if status == "running" else None
            self.files.save(self.vit, self.results, tuner)
        return dict(self.results[-1])  # Ray adds to it

    def _begin(self, config: dict[str, Any]) -> None:
        self.config = config
        self.plan = Plan.from_json(json.loads(config["plan"]))
        self.files = TrialFiles(self.directory, config)
        self.results: list[dict[str, Any]] = []
        self.repeats: list[dict[str, Any]] = []  # to be reported again
        if (saved := self.files.load()) is not None:
            self._continue(saved)
            return
        self.epoch, self.seconds, self.latency_ms = -1, 0.0, 0.0
        self.measured = Evaluation(top1=0.0, loss=0.0, images=0, images_per_s=0.0)
        uncut = self.dense if config["origin"] == "dense" else self.start
        self.vit = copy.deepcopy(uncut).to(self.device).requires_grad_(True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _continue(self, saved: Saved) -> None:
        """Go on from what was saved."""
        self.results, last = saved.results, saved.results[-1]
        self.repeats = [dict(result) for result in saved.results]
        self.epoch, self.seconds = last["epoch"], last["seconds"]
        self.latency_ms = last["latency_ms"]
        self.measured = Evaluation(
            top1=last["val_top1"],
            loss=last["val_loss"],
            images=len(self.val_images),
            images_per_s=last["images_per_s"],
        )
        if saved.tuner is not None:
            self.vit = PrunableViT.load(saved.directory).to(self.device)
            self._new_tuner()
            self.tuner.load_state_dict(saved.tuner)

    def _cut(self) -> None:
        torch.manual_seed(self._trial_seed(0))
        path = self.config.get("learned", "")
        learned = Learned.load(Path(path)) if path else None
        self.plan.apply(self.vit, self.calibration, learned)
        self._new_tuner()

    def _latency_ms(self) -> float:
        """Return the time per image; measured for itself where the sweep asks for speed."""
        data, sweep = self.sweep.data, self.sweep
        if sweep.cost != "latency" and sweep.constraints.min_images_per_s is None:
            return 1000.0 / self.measured.images_per_s
        images, _ = next(
            iter(self.val_images.batches(data.eval_batch_size, seed=None, augment=False))
        )
        rate = measured_rate(self.vit, images.to(self.device), LATENCY_BATCHES)
        return 1000.0 / rate

    def _too_slow(self) -> str:
        """Say why a trial need not be trained: it is slower than the sweep allows."""
        least = self.sweep.constraints.min_images_per_s
        rate = 1000.0 / self.latency_ms
        if least is None or rate >= least or self.config["origin"] == "dense":
            return ""
        return f"{rate:.4g} images/s is below min_images_per_s = {least:g}"

    def _new_tuner(self) -> None:
        batch = self.sweep.data.batch_size
        steps = max(1, len(self.train_images) // batch)
        recipe = Recipe(
            epochs=self.config["epochs"], **self.sweep.finetune.model_dump(exclude={"augment"})
        )
        distils = recipe.distill > 0.0
        # A loss on tokens compares them with the teacher's own, which are too many to keep.
        kept = self.vit.token_loss is None and self.teacher.fits(recipe.epochs)
        self.answered = distils and kept
        live = self.teacher.live if distils and not kept else None
        self.tuner = FineTuner(self.vit, recipe, steps, live)

    def _train_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        number = self.epoch + 1
        stream = Epoch(mixed_seed(self.sweep.seed, self._own_seed()), number)
        answers = self.teacher.answers(stream) if self.answered else None
        torch.manual_seed(self._trial_seed(number))  # dropout and drop path
        for images, labels, rows in self.train_images.numbered(
            self.sweep.data.batch_size,
            order=stream,
            views=stream if self.sweep.finetune.augment else None,
            device=self.device,
        ):
            yield images, labels, None if answers is None else torch.from_numpy(answers[rows])

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.val_images.batches(
            self.sweep.data.eval_batch_size, seed=None, augment=False, device=self.device
        )

    def _trial_seed(self, epoch: int) -> int:
        return mixed_seed(self.sweep.seed, self._own_seed(), int(self.config["trial"]), epoch)

    def _own_seed(self) -> int:
        return int(self.config.get("seed", 0))

    def _result(self, status: str, reason: str, loss: float) -> dict[str, Any]:
        shape = self.vit.shape()
        cost = cost_of(shape)
        return {
            "trial": self.config["trial"],
            "epoch": self.epoch,
            "status": status,
            "reason": reason,
            "val_top1": self.measured.top1,
            "val_loss": self.measured.loss,
            "train_loss": loss,
            "cost_ratio": self.config["cost_ratio"],
            "gmacs": cost.gmacs,
            "effective_gmacs": cost.effective_gmacs,
            "params": cost.params,
            "density": cost.density,
            "images_per_s": self.measured.images_per_s,
            "latency_ms": self.latency_ms,
            "seconds": self.seconds,
            "shape": json.dumps(shape.to_json()),
            "done": status != "running",
        }
