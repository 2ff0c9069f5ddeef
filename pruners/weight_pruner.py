"""The weight family: single weights of the linear layers become zero and stay zero."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from pruners.allocation import rank_globally, same_share
from pruners.masks import apply_masks, keep_highest
from pruners.pruner import Pruner, Scores, Thresholds
from pruners.shape import ViTShape, units_kept
from pruners.vit import PrunableViT


@dataclass(frozen=True, kw_only=True)
class WeightPruner(Pruner, abc.ABC):
    """A method that scores single weights. Its sites are the linear layers of the blocks.

    Attributes:
        scope: How `allocate` spreads a budget: "global" ranks the weights of all layers together,
            "layer" gives each layer the same share.
    """

    family: ClassVar[str] = "weight"

    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.scope not in ("global", "layer"):
            raise ValueError(
                f"option scope of {self.name} is {self.scope!r}; give 'global' or 'layer'"
            )

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return the linear layers with their number of weights."""
        return {site: rows * columns for site, rows, columns, _ in shape.linears()}

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape after masking; a layer that is already sparser stays as it is."""
        self.check(shape, thresholds)
        sites = self.sites(shape)
        nonzero = dict(shape.nonzero)
        for site, share in thresholds.items():
            kept = units_kept(sites[site], share)
            if kept < nonzero.get(site, sites[site]):
                nonzero[site] = kept
        return dataclasses.replace(shape, nonzero=nonzero)

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Spread a budget over the layers: see `scope`."""

        def shrink(shares: dict[str, float]) -> ViTShape:
            return self.shrink(shape, shares)

        if self.scope == "layer":
            return same_share(list(self.sites(shape)), shrink, macs, largest=0.999)
        return rank_globally(
            shape, {s: v.flatten().sort().values for s, v in scores.items()}, shrink, macs
        )

    def cut(self, vit: PrunableViT, scores: Scores, thresholds: Thresholds) -> None:
        """Mask the lowest scores of each layer; weights that were masked before stay so."""
        target = self.shrink(vit.shape(), thresholds)
        layers = dict(vit.linears())
        for site in (s for s, share in thresholds.items() if share > 0.0 and s in target.nonzero):
            score = scores[site]
            if site in vit.masks:
                score = score.masked_fill(~vit.masks[site].to(score.device), float("-inf"))
            mask = keep_highest(score, target.nonzero[site])
            vit.masks[site] = mask.to(layers[site].weight.device)
        apply_masks(layers, vit.masks)
