"""Accuracy and speed of a model, measured on labelled images."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.model.types import Batches
from pruners.model.vit import ViT, eval_mode


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a pass over labelled images measured.

    Attributes:
        top1: Share of images whose highest logit is the label's, in percent.
        loss: Mean cross-entropy.
        images: Number of images.
        images_per_s: Median over full batches, the first one left out as warm-up where there are
            several; the forward pass only.
        by_class: Top-1 of each class, in percent; None for a class without images.
    """

    top1: float
    loss: float
    images: int
    images_per_s: float
    by_class: tuple[float | None, ...] = ()


@torch.inference_mode()
def evaluate(vit: ViT, batches: Batches) -> Evaluation:
    """Measure a model on labelled images, in float32.

    Raises:
        ValueError: If there are no images.
    """
    device = next(vit.parameters()).device
    loss, images_seen = 0.0, 0
    counts: list[Tensor] = []  # [2, classes]: correct answers, images
    timings: list[tuple[int, float]] = []
    with eval_mode(vit):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            start = time.perf_counter()
            logits = vit(images)
            _wait(device)
            timings.append((len(labels), time.perf_counter() - start))
            counts.append(_counts(logits, labels).cpu())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            images_seen += len(labels)
    if images_seen == 0:
        raise ValueError("there are no images to evaluate on; give a set with at least one")
    correct, total = torch.stack(counts).sum(0)
    return Evaluation(
        top1=100.0 * int(correct.sum()) / images_seen,
        loss=loss / images_seen,
        images=images_seen,
        images_per_s=images_per_second(timings),
        by_class=tuple(
            100.0 * hits / count if count else None
            for hits, count in zip(correct.tolist(), total.tolist(), strict=True)
        ),
    )


@torch.inference_mode()
def measured_rate(vit: ViT, images: Tensor, repeats: int) -> float:
    """Return images per second of the forward pass: the median of so many runs, warmed up.

    Args:
        vit: The model.
        images: [B, channels, height, width], on the model's device.
        repeats: Runs that are measured, after one that is not.
    """
    timings: list[tuple[int, float]] = []
    with eval_mode(vit):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            vit(images)
            _wait(images.device)
            timings.append((len(images), time.perf_counter() - start))
    return images_per_second(timings)


def images_per_second(timings: list[tuple[int, float]]) -> float:
    """Return the median rate of (images, seconds) pairs of the largest batch size.

    The first is left out as warm-up if others remain.
    """
    largest = max(count for count, _ in timings)
    rates = [count / seconds for count, seconds in timings if count == largest]
    return statistics.median(rates[1:] or rates)


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how often each class is given and found, [2, classes]: found first."""
    classes = logits.shape[1]
    found = labels[logits.argmax(dim=1) == labels]
    return torch.stack([torch.bincount(x, minlength=classes) for x in (found, labels)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
