"""Gradients of the training loss with respect to the weights of the linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.pruner import Batches
from pruners.vit import PrunableViT


def batch_gradients(vit: PrunableViT, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Yield, for each batch, site -> gradient of its mean cross-entropy, of the weight's shape.

    The model runs in evaluation mode (no dropout), and neither its mode nor any `.grad` is changed
    by this.

    Raises:
        ValueError: If a weight is frozen.
    """
    layers = dict(vit.linears())
    weights = [layer.weight for layer in layers.values()]
    for site, layer in layers.items():
        if not layer.weight.requires_grad:
            raise ValueError(
                f"{site} is frozen (requires_grad is False); unfreeze it to measure gradients"
            )
    was_training = vit.training
    vit.eval()
    try:
        for images, labels in batches:
            device = weights[0].device
            loss = F.cross_entropy(vit(images.to(device)), labels.to(device))
            yield dict(zip(layers, torch.autograd.grad(loss, weights), strict=True))
    finally:
        vit.train(was_training)
