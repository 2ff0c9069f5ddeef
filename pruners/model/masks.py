"""Weight masks: zero the lowest scores, and keep zeros zero while training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def keep_highest(scores: Tensor, kept: int) -> Tensor:
    """Return a bool mask [...] of exactly `kept` of the highest scores [...].

    Ties are broken by position, so the number is exact.
    """
    flat = scores.detach().flatten()
    order = torch.argsort(flat, descending=True, stable=True)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[order[:kept]] = True
    return mask.view(scores.shape)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Return a bool mask that keeps the `n` highest of each `m` consecutive scores of a row.

    Args:
        scores: [out, in], `in` a multiple of m.
        n: Scores that stay, of each group.
        m: Size of a group.
    """
    groups = scores.detach().unflatten(1, (-1, m))  # [out, in / m, m]
    order = torch.argsort(groups, dim=-1, descending=True, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(2, order[..., :n], True).flatten(1)


def nonzero_mask(weight: Tensor, kept: int, site: str) -> Tensor:
    """Recover the mask of a stored weight [out, in]: its `kept` entries of largest magnitude.

    Raises:
        ValueError: If more than `kept` entries are not zero.
    """
    nonzero = int(weight.count_nonzero())
    if nonzero > kept:
        raise ValueError(f"{site} has {nonzero} weights that are not zero; its shape says {kept}")
    return keep_highest(weight.abs(), kept)


@torch.no_grad()
def apply_masks(layers: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> None:
    """Zero the masked weights in place.

    Args:
        layers: Site -> layer.
        masks: Site -> bool mask [out, in] of the layer's weight, True where kept.
    """
    if masks:
        weights = [layers[site].weight for site in masks]
        keeps = [mask.to(w.dtype) for mask, w in zip(masks.values(), weights, strict=True)]
        torch._foreach_mul_(weights, keeps)
