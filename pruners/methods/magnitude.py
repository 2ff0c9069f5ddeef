"""Magnitude pruning: |w| (Han et al., 2015, arXiv:1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from pruners.families.pruner import Batches, Scores
from pruners.families.weight import WeightPruner
from pruners.model.vit import PrunableViT


@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightPruner):
    """Saliency |w|; needs no data."""

    def score(self, vit: PrunableViT, batches: Batches) -> Scores:
        """Return |w| of each weight."""
        return {site: layer.weight.detach().abs() for site, layer in vit.linears()}
