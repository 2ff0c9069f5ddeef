"""One trial: apply the plan to the dense model, report, fine-tune epoch by epoch."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import Tensor

from pruners import Plan, PrunableViT, cost_of
from pruners.learned import Learned
from pruners.training import Evaluation, FineTuner, NonFiniteLossError, Recipe, evaluate
from search.model import image_spec
from search.parquet import Images, open_images
from search.sweep import Sweep

STATE = "trial.pt"
"""File of a checkpoint that only a resumed trial needs: optimiser, schedule, progress."""


@dataclass(frozen=True, kw_only=True)
class TrialInputs:
    """What all trials of a sweep share; Ray keeps it once per node.

    Attributes:
        sweep: The sweep.
        dense: The dense model, on the CPU.
    """

    sweep: Sweep
    dense: PrunableViT


class PlanTrial(tune.Trainable):
    """A trial as Ray Tune runs it: a step is an epoch; the first cuts and measures, untrained.

    The actor is reused from trial to trial, so that torch is imported, the data opened and the
    teacher placed only once. Every random number depends on (seed, trial, epoch) alone, so a
    resumed trial goes on as if nothing had happened.
    """

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        """Prepare the actor, then the first trial."""
        if inputs is None:
            raise ValueError("inputs is None; give TrialInputs through tune.with_parameters")
        self.sweep = inputs.sweep
        torch.set_num_threads(max(1, int(self.sweep.resources.cpu)))
        self.device = trial_device(self.sweep)
        self.teacher = inputs.dense.to(self.device).eval().requires_grad_(False)
        self.teacher.use_fused_attention(self.device.type == "cuda")
        self.train_images = open_split(self.sweep, inputs.dense, "train")
        self.val_images = open_split(self.sweep, inputs.dense, "val")
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare the next trial on the same actor."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Run one epoch and return its metrics; the last result of a trial has `done`."""
        start = time.perf_counter()
        status, reason, loss = "running", "", 0.0
        try:
            if self.epoch < 0:
                self._cut()
            else:
                self.plan.ramp(self.vit, self._calibration(), self.epoch + 1)
                loss = self.tuner.train_epoch(self._train_batches())
            self.measured = evaluate(self.vit, self._val_batches())
        except NonFiniteLossError as error:
            status, reason = "failed", f"epoch {self.epoch + 1}: {error}"
        self.epoch += 1
        if status == "running" and self.epoch >= self.config["epochs"]:
            status = "finished"
        self.seconds += time.perf_counter() - start
        return self._result(status, reason, loss)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the model and what resuming needs."""
        directory = Path(checkpoint_dir)
        self.vit.save(directory, measured={"val_top1": self.measured.top1, "epoch": self.epoch})
        if self.epoch < self.config["epochs"]:
            where = {"epoch": self.epoch, "seconds": self.seconds, "measured": vars(self.measured)}
            torch.save({"where": where, "tuner": self.tuner.state_dict()}, directory / STATE)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue a trial from its last epoch."""
        directory = Path(checkpoint_dir)
        self.vit = PrunableViT.load(directory).to(self.device)
        state = torch.load(directory / STATE, map_location=self.device, weights_only=True)
        self.epoch, self.seconds = state["where"]["epoch"], state["where"]["seconds"]
        self.measured = Evaluation(**state["where"]["measured"])
        self._new_tuner()
        self.tuner.load_state_dict(state["tuner"])

    def _begin(self, config: dict[str, Any]) -> None:
        self.config = config
        self.plan = Plan.from_json(config["plan"])
        self.epoch, self.seconds = -1, 0.0
        self.measured = Evaluation(top1=0.0, loss=0.0, images=0, images_per_s=0.0)
        self.vit = copy.deepcopy(self.teacher).requires_grad_(True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cut(self) -> None:
        torch.manual_seed(self._seed(0))
        path = self.config.get("learned", "")
        learned = Learned.load(Path(path)) if path else None
        self.plan.apply(self.vit, self._calibration(), learned)
        self._new_tuner()

    def _calibration(self) -> list[tuple[Tensor, Tensor]]:
        return list(calibration_batches(self.sweep, self.train_images, self.device))

    def _new_tuner(self) -> None:
        batch = self.sweep.data.batch_size
        steps = max(1, len(self.train_images) // batch)
        recipe = Recipe(
            epochs=self.config["epochs"], **self.sweep.finetune.model_dump(exclude={"augment"})
        )
        self.tuner = FineTuner(self.vit, recipe, steps, self.teacher)

    def _train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = self._seed(self.epoch + 1)
        torch.manual_seed(seed)  # dropout and drop path
        augment = self.sweep.finetune.augment
        return self.train_images.batches(
            self.sweep.data.batch_size, seed=seed, augment=augment, device=self.device
        )

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.val_images.batches(
            self.sweep.data.eval_batch_size, seed=None, augment=False, device=self.device
        )

    def _seed(self, epoch: int) -> int:
        return (self.sweep.seed * 1_000_003 + int(self.config["trial"])) * 1_009 + epoch

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
            "seconds": self.seconds,
            "shape": json.dumps(shape.to_json()),
            "done": status != "running",
        }


def trial_device(sweep: Sweep) -> torch.device:
    """Return the device of this process's trials: the GPU that Ray gave it, or the CPU.

    Raises:
        ValueError: If trials get GPUs that PyTorch cannot use on this node.
    """
    if not sweep.resources.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"resources.gpu is {sweep.resources.gpu}, but PyTorch finds no GPU on this node; "
            "install a CUDA build of torch there, or give --set resources.gpu=0"
        )
    return torch.device("cuda")


def open_split(sweep: Sweep, dense: PrunableViT, split: str) -> Images:
    """Open `train`, `val` or `test` of a sweep's data, prepared for its model."""
    data = sweep.data
    return open_images(
        getattr(data, split),
        image_spec(dense),
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        max_corrupt=data.max_corrupt,
        image_column=data.image_column,
        label_column=data.label_column,
    )


def calibration_batches(
    sweep: Sweep, images: Images, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training images that scores are measured on, the same for every trial."""
    batch = min(sweep.data.batch_size, sweep.data.calibration)
    batches = images.batches(batch, seed=sweep.seed, augment=False, device=device)
    return islice(batches, max(1, sweep.data.calibration // batch))


def measure_on_test(directory: Path, sweep: Sweep, dense: PrunableViT) -> float:
    """Measure a saved model on the test split, in percent."""
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    device = trial_device(sweep)
    vit = PrunableViT.load(directory).to(device)
    vit.use_fused_attention(device.type == "cuda")
    images = open_split(sweep, dense, "test")
    return evaluate(
        vit, images.batches(sweep.data.eval_batch_size, seed=None, augment=False, device=device)
    ).top1
