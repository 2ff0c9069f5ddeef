"""What the benchmarks share that time a cut model in turn with the dense one."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from pruners import PrunableViT


@torch.inference_mode()
def rate(vit: PrunableViT, images: Tensor) -> float:
    """Images per second of one forward pass."""
    start = time.perf_counter()
    vit(images)
    return len(images) / (time.perf_counter() - start)


def in_turn(
    vit: PrunableViT, dense: PrunableViT, images: Tensor, rounds: int, warmup: int = 1
) -> tuple[float, float]:
    """Median rate of the cut model, and the median of how many times the dense one's it is."""
    pairs = [(rate(vit, images), rate(dense, images)) for _ in range(rounds + warmup)][warmup:]
    return statistics.median(own for own, _ in pairs), statistics.median(a / b for a, b in pairs)
