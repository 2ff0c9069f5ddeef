"""Seconds that several things take, timed in turn: a busy moment of the machine hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pruners.vit import PrunableViT

Call = Callable[[], object]


def seconds_in_turn(
    calls: Sequence[Call],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Return the seconds of each call in each round.

    Args:
        calls: What is timed; each is called once in a round.
        rounds: Rounds that count.
        warmup: Rounds before these, which do not.
        device: Where the calls compute; None is the CPU.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmup:
                taken.append(time.perf_counter() - start)
    return times


def forward_call(vit: PrunableViT, images: Tensor) -> Call:
    """Return what runs a model, in evaluation mode, on images on its device."""
    return torch.inference_mode()(lambda: vit(images))
