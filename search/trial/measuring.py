"""Measurements of a trial's model: top-1 and loss after each epoch, its speed once."""

from __future__ import annotations

from pruners import PrunableViT
from pruners.training.evaluation import Evaluation, evaluate, measured_rate
from search.sweep.spec import Sweep
from search.trial.context import TrialContext

LATENCY_BATCHES = 5
"""Batches that a model's speed is the median of; one more before them warms up."""


def validate(context: TrialContext, vit: PrunableViT, parts: int) -> Evaluation:
    """Measure a model on the validation images, in batches of which each is passed in parts."""
    size = max(1, context.sweep.data.eval_batch_size // parts)
    images = context.val_images
    return evaluate(vit, images.batches(size, seed=None, augment=False, device=context.device))


def latency_ms(context: TrialContext, vit: PrunableViT, measured: Evaluation) -> float:
    """Return the time per image: of an evaluation, or its own where the sweep asks for speed."""
    sweep = context.sweep
    if sweep.cost != "latency" and sweep.constraints.min_images_per_s is None:
        return 1000.0 / measured.images_per_s
    size = sweep.data.eval_batch_size
    images, _ = next(iter(context.val_images.batches(size, seed=None, augment=False)))
    return 1000.0 / measured_rate(vit, images.to(context.device), LATENCY_BATCHES)


def too_slow(sweep: Sweep, latency_ms: float) -> str:
    """Say why a model need not be trained, if it is slower than the sweep allows."""
    least = sweep.constraints.min_images_per_s
    rate = 1000.0 / latency_ms
    if least is None or rate >= least:
        return ""
    return f"{rate:.4g} images/s is below min_images_per_s = {least:g}"
