"""Masks of units per class: what their size and their unevenness cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_square(masks: Sequence[Tensor]) -> Tensor:
    """Return the mean over sites of the mean square of a site's masks [C, units]; []."""
    return torch.stack([mask.square().mean() for mask in masks]).mean()


def unevenness(masks: Sequence[Tensor], runs: Sequence[int], over: str) -> Tensor:
    """Return the mean over sites of the mean size of `second_difference`; [].

    Args:
        masks: [C, units] of each site.
        runs: Of each site, see `second_difference`.
        over: "units" or "classes".
    """
    differences = [second_difference(m, run, over) for m, run in zip(masks, runs, strict=True)]
    return torch.stack([difference.abs().mean() for difference in differences]).mean()


def second_difference(mask: Tensor, run: int, over: str) -> Tensor:
    """Return x[i-1] - 2 x[i] + x[i+1] of a mask [C, units] (eq. 6).

    Args:
        mask: [C, units].
        run: Units that follow on each other; a head's last dim has no neighbour in the next head.
        over: "units" or "classes", along which to difference.
    """
    x = mask.unflatten(1, (-1, run)) if over == "units" else mask.t()
    if x.shape[-1] < 3:
        return x.new_zeros(1)
    return x[..., :-2] - 2.0 * x[..., 1:-1] + x[..., 2:]
