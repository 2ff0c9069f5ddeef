"""The weight family: single weights of the linear layers become zero and stay zero."""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruners.families.allocation import rank_globally, same_share
from pruners.families.options import option
from pruners.families.pruner import Pruner
from pruners.model.masks import apply_masks, keep_highest, keep_n_of_m
from pruners.model.shape import ViTShape, units_kept
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT

PATTERNS = {"none": (0, 0), "2:4": (2, 4), "4:8": (4, 8)}
"""Name of a pattern -> (weights that stay, of so many consecutive inputs)."""


SAMPLE = 1 << 14
"""Weights of a layer whose scores stand for all of them where layers are ranked together."""


@dataclass(frozen=True, kw_only=True)
class WeightPruner(Pruner, abc.ABC):
    """A method that scores single weights. Its sites are the linear layers of the blocks.

    Attributes:
        scope: How `allocate` spreads a budget: "global" ranks the weights of all layers together,
            "layer" gives each layer the same share.
        pattern: "none" masks any weights; "2:4" and "4:8" keep as many of each 4 or 8 consecutive
            inputs of every output. With a pattern, a layer whose share is at least half of the
            pattern's (0.25) is masked to it, and other layers are not.
        rounds: Sub-steps in which the shares are reached, linearly, scoring anew before each.
        ramp_epochs: Epochs of fine-tuning over which the shares are reached, on a cubic ramp (Zhu &
            Gupta, 2017, arXiv:1710.01878), scoring anew before each; 0 cuts at once.
    """

    family: ClassVar[str] = "weight"

    scope: Literal["global", "layer"] = "global"
    pattern: Literal["none", "2:4", "4:8"] = "none"
    rounds: int = option(1, low=1)
    ramp_epochs: int = option(0, low=0)

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return the linear layers with their number of weights."""
        return {site: rows * columns for site, rows, columns, _ in shape.linears()}

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape after masking; a layer that is already sparser stays as it is."""
        self.check(shape, thresholds)
        sites = self.sites(shape)
        nonzero = dict(shape.nonzero)
        for site, share in thresholds.items():
            kept = self._kept(shape, site, sites[site], share)
            if kept < nonzero.get(site, sites[site]):
                nonzero[site] = kept
        return dataclasses.replace(shape, nonzero=nonzero)

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Spread a budget over the layers: see `scope`."""

        def shrink(shares: dict[str, float]) -> ViTShape:
            return self.shrink(shape, shares)

        if self.pattern != "none":
            return rank_globally(shape, {s: self._loss(v) for s, v in scores.items()}, shrink, macs)
        if self.scope == "layer":
            return same_share(list(self.sites(shape)), shrink, macs, largest=0.999)
        ascending = {site: _sample(score).sort().values for site, score in scores.items()}
        return rank_globally(shape, ascending, shrink, macs)

    def prune(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Reach the thresholds in `rounds` sub-steps."""
        for step in range(1, self.rounds + 1):
            shares = {site: share * step / self.rounds for site, share in thresholds.items()}
            self.prune_once(vit, batches, shares)

    def prune_once(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Score and mask."""
        self.cut(vit, self.score(vit, batches), thresholds)

    def ramped(self, thresholds: Thresholds, epoch: int) -> Thresholds:
        """Return the shares of a cubic ramp: s (1 - (1 - (epoch + 1) / (ramp_epochs + 1))^3)."""
        left = max(0.0, 1.0 - (epoch + 1) / (self.ramp_epochs + 1))
        return {site: share * (1.0 - left**3) for site, share in thresholds.items()}

    def cut(self, vit: ViT, scores: Scores, thresholds: Thresholds) -> None:
        """Mask the lowest scores of each layer; weights that were masked before stay so."""
        target = self.shrink(vit.shape(), thresholds)
        for site, share in thresholds.items():
            if share > 0.0 and site in target.nonzero:
                vit.masks[site] = self.mask(vit, site, scores[site], target.nonzero[site])
        apply_masks(dict(vit.linears()), vit.masks)

    def mask(self, vit: ViT, site: str, scores: Tensor, kept: int) -> Tensor:
        """Return the mask of a layer: `kept` of the highest scores [out, in], or the pattern's."""
        if site in vit.masks:
            scores = scores.masked_fill(~vit.masks[site].to(scores.device), float("-inf"))
        if self.pattern == "none":
            return keep_highest(scores, kept)
        return keep_n_of_m(scores, *PATTERNS[self.pattern])

    def _kept(self, shape: ViTShape, site: str, weights: int, share: float) -> int:
        if self.pattern == "none":
            return units_kept(weights, share)
        n, m = PATTERNS[self.pattern]
        if share < 0.5 * (1.0 - n / m):
            return weights
        inputs = next(columns for name, _, columns, _ in shape.linears() if name == site)
        if inputs % m:
            raise ValueError(
                f"{site} has {inputs} inputs; the pattern {self.pattern} needs a multiple of {m}"
            )
        return weights * n // m

    def _loss(self, scores: Tensor) -> Tensor:
        """Score [2] of masking a whole layer to the pattern (the second never goes)."""
        keep = keep_n_of_m(scores, *PATTERNS[self.pattern])
        lost = scores[~keep].double().sum()
        return torch.stack([lost, lost])


def _sample(scores: Tensor) -> Tensor:
    """Return up to twice `SAMPLE` of a layer's scores [out, in], spread over rows and columns."""
    stride = max(1, scores.numel() // SAMPLE)
    while math.gcd(stride, scores.shape[-1]) > 1:
        stride += 1
    return scores.flatten()[::stride]
