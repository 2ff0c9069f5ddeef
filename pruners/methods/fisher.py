"""Diagonal Fisher saliency 1/2 w^2 mean_k g_k^2 (Theis et al., 2018, arXiv:1801.05787)."""

from __future__ import annotations

from dataclasses import dataclass

from pruners.families.weight import WeightPruner
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT
from pruners.saliency.diagonal import quadratic_saliency, sample_mean_squares


@dataclass(frozen=True, kw_only=True)
class Fisher(WeightPruner):
    """Second-order saliency with the diagonal of the empirical Fisher matrix for the Hessian's.

    g_k is the gradient of image k's own loss with its true label. The squares are averaged: the
    square of the average vanishes at a minimum.
    """

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return the saliency of each weight."""
        return quadratic_saliency(vit, sample_mean_squares(vit, batches))
