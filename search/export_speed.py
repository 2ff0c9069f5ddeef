"""Speed of a model and of the dense one on this CPU, in PyTorch and in onnxruntime."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pruners import PrunableViT
from pruners.export.onnx import onnx_call
from pruners.latency.timing import forward_call, seconds_in_turn

SECONDS = 4.0
"""Seconds of measuring per batch size, about; of a large model, as long as three rounds take."""

BATCH, BATCH_SECONDS = 64, 8.0
"""Images of the larger batch; fewer where the dense model would take more seconds than this."""

MOST_ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of runs in turn with the dense model.

    Attributes:
        runtime: "pytorch" or "onnxruntime".
        batch: Images at once.
        dense_images_per_s: The dense model's.
        images_per_s: The model's.
        faster: Median ratio of the seconds, dense to own, of runs beside each other.
        rounds: Runs of each.
    """

    runtime: str
    batch: int
    dense_images_per_s: float
    images_per_s: float
    faster: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def measure_speed(
    dense: PrunableViT, vit: PrunableViT, files: tuple[Path, Path], images: Tensor
) -> list[Speed]:
    """Measure a model beside the dense one, with one image and with many, in both runtimes.

    All run with as many threads as PyTorch has.

    Args:
        dense: The dense model, in evaluation mode, on the CPU.
        vit: The pruned model, likewise.
        files: The two as ONNX files.
        images: [B, channels, height, width]; repeated where more are needed.
    """
    single = _measured(dense, vit, files, images[:1])
    per_image = 1.0 / single[0].dense_images_per_s
    batch = max(1, min(BATCH, int(BATCH_SECONDS / per_image)))
    many = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    return single + _measured(dense, vit, files, many)


def _measured(
    dense: PrunableViT, vit: PrunableViT, files: tuple[Path, Path], images: Tensor
) -> list[Speed]:
    calls = [
        *(forward_call(model, images) for model in (dense, vit)),
        *(onnx_call(file, images) for file in files),
    ]
    first = sum(taken for (taken,) in seconds_in_turn(calls, rounds=1))
    rounds = max(2, min(MOST_ROUNDS, int(SECONDS / first)))
    times = seconds_in_turn(calls, rounds=rounds, warmup=0)
    return [
        _speed("pytorch", len(images), times[0], times[1]),
        _speed("onnxruntime", len(images), times[2], times[3]),
    ]


def _speed(runtime: str, batch: int, dense: Sequence[float], own: Sequence[float]) -> Speed:
    return Speed(
        runtime=runtime,
        batch=batch,
        dense_images_per_s=batch / statistics.median(dense),
        images_per_s=batch / statistics.median(own),
        faster=statistics.median(a / b for a, b in zip(dense, own, strict=True)),
        rounds=len(own),
    )
