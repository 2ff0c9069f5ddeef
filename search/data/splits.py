"""Inputs of a sweep's trials: splits, calibration images, teacher, device, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pruners import PrunableViT
from pruners.training.optimisation import autocast_dtype
from search.data.cache import default_cache
from search.data.images import Images, open_images
from search.data.model import image_spec
from search.data.teacher import Teacher
from search.sweep.spec import Sweep


class Calibration:
    """Calibration images: training images that scores are measured on, read at their first use.

    They are the same for every trial, so the actor keeps them, in main memory: batches to go over
    as often as needed.
    """

    def __init__(self, sweep: Sweep, images: Images, device: torch.device) -> None:
        """Read nothing yet."""
        self.sweep, self.images, self.device = sweep, images, device
        self._held: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, channels, height, width] and labels [B], on the device."""
        if self._held is None:
            self._held = list(calibration_batches(self.sweep, self.images, torch.device("cpu")))
        for images, labels in self._held:
            yield images.to(self.device), labels.to(self.device)


def mixed_seed(*parts: int) -> int:
    """Mix numbers, at least 0, into a seed of 64 bits."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def make_teacher(sweep: Sweep, dense: PrunableViT, train: Images, device: torch.device) -> Teacher:
    """Return the dense model as teacher for a sweep's training images."""
    data = sweep.data
    return Teacher(
        dense,
        train,
        augment=sweep.finetune.augment,
        autocast=autocast_dtype(sweep.finetune.precision, device),
        device=device,
        folder=Path(data.cache_dir) if data.cache_dir is not None else default_cache(),
        limit_gb=data.teacher_gb,
        batch_size=data.batch_size,
    )


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
    """Open `train`, `val` or `test` of a sweep's data, prepared for its model.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it is damaged, or has more corrupt images than allowed.
    """
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
    """Yield calibration images [B, C, H, W] and labels [B], the same for every trial."""
    batch = min(sweep.data.batch_size, sweep.data.calibration)
    batches = images.batches(batch, seed=sweep.seed, augment=False, device=device)
    return islice(batches, max(1, sweep.data.calibration // batch))
