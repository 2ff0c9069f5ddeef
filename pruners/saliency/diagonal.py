"""Diagonals of curvature matrices: of the Fisher, the Gauss-Newton and the Hessian matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT
from pruners.saliency.gradients import check_layers, evaluating, sample_gradients

_MOST_BYTES = 256e6  # of per-image gradients that are held at a time


def quadratic_saliency(vit: ViT, diagonal: Mapping[str, Tensor]) -> Scores:
    """Return 1/2 w^2 H_ii of each weight, for diagonals of the weights' shapes [out, in]."""
    layers = dict(vit.linears())
    return {k: 0.5 * layers[k].weight.detach().float() ** 2 * d for k, d in diagonal.items()}


def sample_mean_squares(
    vit: ViT, batches: Batches, *, draw_labels: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return site -> mean over images of the squared gradient of the image's loss, [out, in].

    With true labels this is the diagonal of the empirical Fisher matrix; with labels drawn from the
    model's predictions, that of the true Fisher matrix, which for cross-entropy is the Gauss-Newton
    matrix (Martens, 2020, arXiv:1412.1193, section 9.2).

    Args:
        vit: The model.
        batches: Calibration images.
        draw_labels: Draws labels from the predictions instead of taking the true ones.

    Raises:
        ValueError: If a weight is frozen, or there are no images.
    """
    layers = dict(vit.linears())
    check_layers(layers)
    totals = {k: torch.zeros_like(v.weight, dtype=torch.float32) for k, v in layers.items()}
    step = max(1, int(_MOST_BYTES // (4 * sum(t.numel() for t in totals.values()))))
    device, seen = next(vit.parameters()).device, 0
    with evaluating(vit):
        for images, labels in batches:
            for few, true in zip(images.split(step), labels.split(step), strict=True):
                given = few.to(device)
                chosen = true if draw_labels is None else _drawn(vit, given, draw_labels)
                for site, g in sample_gradients(vit, given, chosen.to(device), layers).items():
                    totals[site] += g.float().square().sum(0)
                seen += len(few)
    if seen == 0:
        raise ValueError("there are no calibration images; give at least one batch")
    return {site: total / seen for site, total in totals.items()}


def hutchinson(
    vit: ViT, batches: Batches, probes: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Hessian of the mean loss: E[z * (H z)], z of random signs.

    Entries may be negative. The variance of entry i is the sum of H_ij^2 over j != i, divided by
    the number of probes.

    Raises:
        ValueError: If a weight is frozen, or there are no images.
    """
    layers = dict(vit.linears())
    check_layers(layers)
    weights = [layer.weight for layer in layers.values()]
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    device, seen = weights[0].device, 0
    with evaluating(vit):
        for images, labels in batches:
            loss = F.cross_entropy(vit(images.to(device)), labels.to(device))
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            estimates = estimate_diagonal(gradients, weights, probes, generator)
            for total, estimate in zip(totals, estimates, strict=True):
                total += estimate * len(labels)
            seen += len(labels)
    if seen == 0:
        raise ValueError("there are no calibration images; give at least one batch")
    return {site: total / seen for site, total in zip(layers, totals, strict=True)}


def estimate_diagonal(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], probes: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the mean of z * (H z) over random signs z, of each weight's shape [...].

    Args:
        gradients: Gradients of a loss by `weights`, with a graph of their own.
        weights: The weights.
        probes: Number of z.
        generator: Source of the signs.
    """
    totals = [torch.zeros_like(w) for w in weights]
    for _ in range(probes):
        signs = [_signs(w, generator) for w in weights]
        products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
        for total, sign, product in zip(totals, signs, products, strict=True):
            total += sign * product / probes
    return totals


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * bits - 1).to(like.device, like.dtype)


@torch.no_grad()
def _drawn(vit: ViT, images: Tensor, generator: torch.Generator) -> Tensor:
    chances = vit(images).float().softmax(dim=1).cpu()
    return torch.multinomial(chances, 1, generator=generator).squeeze(1)
