"""Kronecker factors of the loss's curvature, for what a layer reads and for what it says.

The Fisher matrix of a linear layer's weights is approximated by H (x) G, with inputs a and output
gradients g (K-FAC; Martens & Grosse, 2015, arXiv:1503.05671): H, the covariance of a over tokens,
says how well inputs can stand in for each other, and G = E[sum over tokens of g g^T] what an error
of the output costs in loss, the same unit in all layers of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.model.least_squares import Moments
from pruners.model.types import Batches
from pruners.model.vit import ViT
from pruners.saliency.gradients import evaluating, recorded

Labels = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, classes] and given labels [B] -> the labels [B] of which the loss is taken."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What is known of a place at which something is read.

    Attributes:
        inputs: H, [in, in], the covariance of what is read, over tokens.
        outputs: G, [out, out], the sum over tokens of the gradient's outer product, a mean over
            images.
    """

    inputs: Tensor
    outputs: Tensor


class _Sums:
    """The sums that factors are made of."""

    def __init__(self) -> None:
        self.moments, self.outer, self.images = Moments(), torch.zeros(()), 0

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add inputs [B, N, in] and the gradient of their output, [B, N, out]."""
        flat = inputs.flatten(0, 1).float()
        self.moments.add(flat)
        g = gradient.flatten(0, 1).float()
        self.outer = self.outer.to(g.device) + (g.T @ g).double()
        self.images += len(gradient)

    def factors(self) -> Factors:
        return Factors(inputs=self.moments.covariances()[0], outputs=self.outer / self.images)


def true_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the given labels [B]: the empirical Fisher matrix."""
    return labels.to(logits.device)


def drawn_labels(generator: torch.Generator) -> Labels:
    """Return labels [B] drawn from the model's own answers: the Fisher matrix, without labels."""

    def draw(logits: Tensor, labels: Tensor) -> Tensor:
        chances = logits.detach().float().softmax(dim=1).cpu()
        return torch.multinomial(chances, 1, generator=generator).squeeze(1).to(logits.device)

    return draw


def kronecker_factors(
    vit: ViT, batches: Batches, places: dict[str, nn.Module], labels: Labels
) -> dict[str, Factors]:
    """Return the factors at some places of a model, which is left as it was.

    Args:
        vit: The model.
        batches: Calibration images.
        places: Name -> module that reads [B, N, in], [B, in], or keys by head, [B, H, N, K], which
            count as [B, N, H * K]; the gradient is that of what it says.
        labels: See `Labels`.

    Raises:
        ValueError: If there are no images.
    """
    sums = {name: _Sums() for name in places}
    device = next(vit.parameters()).device
    with evaluating(vit), recorded(places) as (inputs, outputs), torch.enable_grad():
        for images, given in batches:
            logits = vit(images.to(device))
            loss = F.cross_entropy(logits, labels(logits, given), reduction="sum")
            gradients = torch.autograd.grad(loss, [outputs[name] for name in places])
            for name, gradient in zip(places, gradients, strict=True):
                sums[name].add(_by_token(inputs[name]), _by_token(gradient))
    if any(each.images == 0 for each in sums.values()):
        raise ValueError("there are no calibration images; give at least one batch")
    return {name: each.factors() for name, each in sums.items()}


def _by_token(x: Tensor) -> Tensor:
    """Return [B, N, D] as it is, [B, D] as one token, [B, H, N, K] as [B, N, H * K]."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x if x.dim() == 3 else x.transpose(1, 2).flatten(2)
