"""Magnitude pruning: |w| (Han et al., 2015, arXiv:1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from pruners.pruner import Batches, Scores
from pruners.vit import PrunableViT
from pruners.weight_pruner import WeightPruner


@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightPruner):
    """Saliency |w|; needs no data."""

    def score(self, vit: PrunableViT, batches: Batches) -> Scores:
        """Return |w| of each weight."""
        return {site: layer.weight.detach().abs() for site, layer in vit.linears()}
