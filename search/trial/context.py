"""Data, models and device that a process opens once for all of its trials."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from pruners import PrunableViT
from search.data.images import Images
from search.data.splits import Calibration, make_teacher, open_split, trial_device
from search.data.teacher import Teacher
from search.sweep.spec import Sweep, SweepFailedError
from search.trial.inputs import TrialInputs
from search.trial.preemption import Notice
from search.trial.trial_files import hung_path
from search.trial.watchdog import ends_if_hung


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """Data, models and device of the trials of a process.

    Attributes:
        sweep: The sweep.
        directory: The sweep's.
        attempt: Number of the driver's lease; after a later one has begun, nothing is saved.
        device: Where they run.
        dense: The dense model, on the CPU; its weights are never changed.
        start: The model that plans cut, likewise.
        train_images: Images that they are trained on.
        val_images: Images that they are measured on.
        calibration: Training images that scores are measured on.
        teacher: The dense model's logits.
        notice: Says whether the process is to end.
    """

    sweep: Sweep
    directory: Path
    attempt: int
    device: torch.device
    dense: PrunableViT
    start: PrunableViT
    train_images: Images
    val_images: Images
    calibration: Calibration
    teacher: Teacher
    notice: Notice

    @classmethod
    def open(cls, inputs: TrialInputs) -> TrialContext:
        """Open the images, and let PyTorch have the CPU cores that the sweep gives a trial.

        Raises:
            SweepFailedError: If the images are no longer those that the sweep began with.
        """
        sweep = inputs.sweep
        torch.set_num_threads(max(1, int(sweep.resources.cpu)))
        device = trial_device(sweep)
        dense = inputs.dense.eval().requires_grad_(False)
        start = inputs.start.eval().requires_grad_(False)
        for vit in (dense, start):
            vit.use_fused_attention(device.type == "cuda")
        train, val = open_split(sweep, dense, "train"), open_split(sweep, dense, "val")
        for key, images in (("train", train), ("val", val)):
            _refuse_changed(f"data.{key}", images.digest, inputs)
        return cls(
            sweep=sweep,
            directory=inputs.directory,
            attempt=inputs.attempt,
            device=device,
            dense=dense,
            start=start,
            train_images=train,
            val_images=val,
            calibration=Calibration(sweep, train, device),
            teacher=make_teacher(sweep, dense, train, device),
            notice=Notice(),
        )


def time_limit(sweep: Sweep, directory: Path, trial: str) -> AbstractContextManager[None]:
    """End the process if what is inside takes longer than an epoch may (`max_epoch_hours`)."""
    return ends_if_hung(directory / hung_path(trial), 3600.0 * sweep.max_epoch_hours)


def _refuse_changed(key: str, digest: str, inputs: TrialInputs) -> None:
    """Stop the sweep if the images of a split are no longer those that it began with."""
    if inputs.fingerprint.get(key, digest) != digest:
        raise SweepFailedError(f"{key} has changed since sweep {inputs.sweep.name} began")
