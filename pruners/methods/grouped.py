"""Grouped saliency: a weight score summed over everything that a unit consists of.

The group of a unit is what surgery removes with it (Fang et al., 2023, arXiv:2301.12900): a head's
q, k and v rows and its columns of proj; a q/k dim's row in q and in k; a v dim's row and its column
of proj; a neuron's row of fc1 and its column of fc2; a residual channel's columns of qkv and fc1
and its rows of proj and fc2, over all blocks. Not scored are biases, nor of a channel its part of
the embedding and the classifiers, which no weight method scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.pruner import load_method
from pruners.families.unit import UnitPruner
from pruners.families.weight import WeightPruner
from pruners.model.attention import Attention
from pruners.model.sites import WIDTH
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Grouped(UnitPruner):
    """Sum of a weight method's scores over each unit.

    Attributes:
        criterion: Name of the weight method whose scores are summed, with its default options.
    """

    criterion: str = "taylor"

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Heads, their dims, neurons, and the width."""
        return (*super().kinds(), WIDTH)

    def __post_init__(self) -> None:
        """Check also that the criterion is a method that scores weights."""
        super().__post_init__()
        method = load_method(self.criterion)
        if not isinstance(method, WeightPruner):
            raise ValueError(
                f"option criterion of grouped is {self.criterion!r}; "
                "give a method of the weight family"
            )

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return the summed scores of the wanted kinds of units."""
        weights = load_method(self.criterion).score(vit, batches)
        scores: Scores = {}
        for index, block in enumerate(vit.blocks):
            if block.attn is not None:
                scores |= _attention_scores(block.attn, weights, f"blocks.{index}.attn")
            if block.mlp is not None:
                rows, columns = (weights[f"blocks.{index}.mlp.{layer}"] for layer in ("fc1", "fc2"))
                scores[f"blocks.{index}.mlp.neuron"] = rows.sum(1) + columns.sum(0)
        wanted = self.sites(vit.shape())
        if WIDTH in wanted:
            scores[WIDTH] = _width_scores(weights)
        return {site: score for site, score in scores.items() if site in wanted}


def _width_scores(weights: Mapping[str, Tensor]) -> Tensor:
    """Return the summed scores [D] of residual channels: what reads them and what writes them."""
    columns = [w.sum(0) for site, w in weights.items() if site.endswith((".qkv", ".fc1"))]
    rows = [w.sum(1) for site, w in weights.items() if site.endswith((".proj", ".fc2"))]
    return torch.stack(columns + rows).sum(0)


def _attention_scores(attn: Attention, weights: Mapping[str, Tensor], name: str) -> Scores:
    qk, v_width = attn.heads * attn.qk_dim, attn.heads * attn.v_dim
    q, k, v = weights[f"{name}.qkv"].sum(1).split([qk, qk, v_width])
    qk_dims = (q + k).view(attn.heads, attn.qk_dim)
    v_dims = (v + weights[f"{name}.proj"].sum(0)).view(attn.heads, attn.v_dim)
    return {
        f"{name}.head": qk_dims.sum(1) + v_dims.sum(1),
        f"{name}.qk_dim": qk_dims,
        f"{name}.v_dim": v_dims,
    }
