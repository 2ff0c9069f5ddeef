"""Masks that keep the highest-ranked units of a site, as many as a trained threshold says."""

from __future__ import annotations

import torch
from torch import Tensor

from pruners.model.gates import hard


def rank_mask(scores: Tensor, threshold: Tensor, ties: Tensor) -> Tensor:
    """Return a mask [n]: 1 for the `kept_count` highest scores [n], else 0.

    With G = dL/dmask the gradients are dL/dscores = G, of masked units too, so that they can come
    back, and dL/dthreshold = sum of G over the kept units, without the sigmoid's derivative.

    Args:
        scores: [n].
        threshold: [].
        ties: [n], a permutation of the units: the order of those whose scores are equal.
    """
    cut = len(scores) - kept_count(threshold, len(scores))
    mask = (ranks(scores, ties) >= cut).to(scores.dtype)
    return mask + (scores - scores.detach()) + mask * (threshold - threshold.detach())


def ranks(scores: Tensor, ties: Tensor) -> Tensor:
    """Return the rank of each score [n], 0 for the lowest; equal ones in the order `ties` [n]."""
    return ties[torch.argsort(scores.detach()[ties], stable=True)].argsort()


def kept_count(threshold: Tensor, units: int) -> Tensor:
    """Return ceil(sigmoid(threshold []) * units), at least 1; []."""
    return (threshold.detach().sigmoid() * units).ceil().clamp(min=1.0)


def kept_fraction(threshold: Tensor, units: int) -> Tensor:
    """Return `kept_count` / units [], with the gradient of max(sigmoid(threshold), 1 / units)."""
    return hard(threshold.sigmoid().clamp(min=1.0 / units), kept_count(threshold, units) / units)
