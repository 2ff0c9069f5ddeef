"""Seconds that several things take, timed in turn: a busy moment of the machine hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pruners.model.vit import ViT

Call = Callable[[], object]


def seconds_in_turn(
    calls: Sequence[Call],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Return the seconds of each call in each round.

    Each is called twice in a round, of which the second call counts: the first one finds another
    model's weights in the caches, as whoever uses one model does not.

    Args:
        calls: What is timed.
        rounds: Rounds that count.
        warmup: Rounds before these, which do not.
        device: Where the calls compute; None is the CPU.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + rounds):
        for call, taken in zip(calls, times, strict=True):
            _finish(call, device)
            start = time.perf_counter()
            _finish(call, device)
            if turn >= warmup:
                taken.append(time.perf_counter() - start)
    return times


def _finish(call: Call, device: torch.device | None) -> None:
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_call(vit: ViT, images: Tensor) -> Call:
    """Return what runs a model, in evaluation mode, on images on its device.

    Args:
        vit: The model.
        images: [B, channels, height, width].
    """
    return torch.inference_mode()(lambda: vit(images))
