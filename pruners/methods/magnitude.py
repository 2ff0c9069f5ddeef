"""Magnitude pruning: |w| (Han et al., 2015, arXiv:1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from pruners.families.weight import WeightPruner
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightPruner):
    """Saliency |w|; needs no data."""

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return |w| of each weight."""
        return {site: layer.weight.detach().abs() for site, layer in vit.linears()}
