"""Accuracy and speed of a model, measured on labelled images."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.pruner import Batches
from pruners.vit import PrunableViT


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a pass over labelled images measured.

    Attributes:
        top1: Share of images whose highest logit is the label's, in percent.
        loss: Mean cross-entropy.
        images: Number of images.
        images_per_s: Median over full batches, the first one left out as warm-up where there are
            several; the forward pass only.
    """

    top1: float
    loss: float
    images: int
    images_per_s: float


@torch.inference_mode()
def evaluate(vit: PrunableViT, batches: Batches) -> Evaluation:
    """Measure a model on labelled images, in float32.

    Raises:
        ValueError: If there are no images.
    """
    was_training = vit.training
    vit.eval()
    device = next(vit.parameters()).device
    correct, loss, images_seen = 0, 0.0, 0
    timings: list[tuple[int, float]] = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        start = time.perf_counter()
        logits = vit(images)
        _wait(device)
        timings.append((len(labels), time.perf_counter() - start))
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        images_seen += len(labels)
    vit.train(was_training)
    if images_seen == 0:
        raise ValueError("there are no images to evaluate on; give a set with at least one")
    return Evaluation(
        top1=100.0 * correct / images_seen,
        loss=loss / images_seen,
        images=images_seen,
        images_per_s=images_per_second(timings),
    )


@torch.inference_mode()
def measured_rate(vit: PrunableViT, images: Tensor, repeats: int) -> float:
    """Return images per second of the forward pass: the median of so many runs, warmed up.

    Args:
        vit: The model.
        images: [B, channels, height, width], on the model's device.
        repeats: Runs that are measured, after one that is not.
    """
    was_training = vit.training
    vit.eval()
    timings: list[tuple[int, float]] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        vit(images)
        _wait(images.device)
        timings.append((len(images), time.perf_counter() - start))
    vit.train(was_training)
    return images_per_second(timings)


def images_per_second(timings: list[tuple[int, float]]) -> float:
    """Return the median rate of (images, seconds) pairs of the largest batch size.

    The first is left out as warm-up if others remain.
    """
    largest = max(count for count, _ in timings)
    rates = [count / seconds for count, seconds in timings if count == largest]
    return statistics.median(rates[1:] or rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
