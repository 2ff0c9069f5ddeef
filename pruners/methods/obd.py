"""Optimal Brain Damage: 1/2 w^2 H_ii, no compensation (LeCun et al., 1990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pruners.families.options import LARGEST_SEED, option
from pruners.families.weight import WeightPruner
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT
from pruners.saliency.diagonal import hutchinson, quadratic_saliency, sample_mean_squares


@dataclass(frozen=True, kw_only=True)
class OBD(WeightPruner):
    """Second-order saliency with the diagonal of the Hessian.

    Attributes:
        hessian: "gauss_newton" takes labels drawn from the model's own predictions: the squared
            gradients then average to the diagonal of the Gauss-Newton matrix, never negative.
            "hutchinson" estimates the Hessian itself as the mean of z * (H z) over random signs z
            (Bekas et al., 2007); entries below 0, which occur away from a minimum, count as 0.
        probes: Random sign vectors per batch, for "hutchinson".
        seed: Of the drawn labels or signs.
    """

    hessian: Literal["gauss_newton", "hutchinson"] = "gauss_newton"
    probes: int = option(4, low=1)
    seed: int = option(0, low=0, high=LARGEST_SEED)

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return the saliency of each weight."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.hessian == "hutchinson":
            estimate = hutchinson(vit, batches, self.probes, generator)
            return quadratic_saliency(vit, {k: v.clamp(min=0.0) for k, v in estimate.items()})
        return quadratic_saliency(vit, sample_mean_squares(vit, batches, draw_labels=generator))
