"""The unit family: heads, head dims, MLP neurons and whole branches are removed."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruners.allocation import rank_globally
from pruners.pruner import Pruner, Scores, Thresholds
from pruners.shape import BlockShape, ViTShape, units_kept
from pruners.surgery import (
    keep_heads,
    keep_neurons,
    keep_qk_dims,
    keep_v_dims,
    remove_attention,
    remove_mlp,
)
from pruners.vit import Block, PrunableViT

KINDS = {"head": "attn", "qk_dim": "attn", "v_dim": "attn", "neuron": "mlp"}
"""Kind of unit -> the branch it belongs to."""


@dataclass(frozen=True, kw_only=True)
class UnitPruner(Pruner, abc.ABC):
    """A method that scores units.

    Sites and their scores: `blocks.<i>.attn.head` [H], `blocks.<i>.attn.qk_dim` [H, K],
    `blocks.<i>.attn.v_dim` [H, V], `blocks.<i>.mlp.neuron` [F]. Of a head's dims each head loses
    the same number, at positions of its own. A threshold of 1 for heads or neurons removes the
    whole branch.

    Attributes:
        units: The kinds of units this step may cut.
    """

    family: ClassVar[str] = "unit"
    whole_sites: ClassVar[bool] = True

    units: tuple[str, ...] = ("head", "neuron")

    def __post_init__(self) -> None:
        """Check the options."""
        wrong = [unit for unit in self.units if unit not in KINDS]
        if wrong or not self.units:
            raise ValueError(
                f"option units of {self.name} is {list(self.units)}; give some of {list(KINDS)}"
            )

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return the sites of the wanted kinds and their number of units (of dims: per head)."""
        sites = {}
        for index, block in enumerate(shape.blocks):
            for kind in self.units:
                count = {
                    "head": block.heads,
                    "qk_dim": block.qk_dim,
                    "v_dim": block.v_dim,
                    "neuron": block.hidden,
                }[kind]
                if count and not (kind == "qk_dim" and shape.qk_norm):
                    sites[f"blocks.{index}.{KINDS[kind]}.{kind}"] = count
        return sites

    def check(self, shape: ViTShape, thresholds: Thresholds) -> None:
        """Also refuse to remove all dims of a head: that is removing the heads."""
        super().check(shape, thresholds)
        for site, share in thresholds.items():
            if share == 1.0 and site.endswith("_dim"):
                raise ValueError(
                    f"threshold of {site} is 1; give a share below 1, or 1 for the block's heads"
                )

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape with fewer units."""
        self.check(shape, thresholds)
        blocks = (
            _shrink_block(block, f"blocks.{i}", thresholds) for i, block in enumerate(shape.blocks)
        )
        return dataclasses.replace(shape, blocks=tuple(blocks))

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Rank all units of all sites together, by score per MAC."""
        steps = {site: _removal_scores(scores[site]) for site in self.sites(shape)}
        return rank_globally(shape, steps, lambda shares: self.shrink(shape, shares), macs)

    def cut(self, vit: PrunableViT, scores: Scores, thresholds: Thresholds) -> None:
        """Remove the units of lowest score: heads first, then dims of the heads that stay."""
        target = self.shrink(vit.shape(), thresholds)
        for index, (block, shape) in enumerate(zip(vit.blocks, target.blocks, strict=True)):
            _cut_attention(block, shape, scores, f"blocks.{index}.attn")
            if block.mlp is not None and shape.hidden == 0:
                remove_mlp(block)
            elif block.mlp is not None and shape.hidden < block.mlp.fc1.out_features:
                keep_neurons(
                    block.mlp, _highest(scores[f"blocks.{index}.mlp.neuron"], shape.hidden)
                )


def _shrink_block(block: BlockShape, name: str, thresholds: Thresholds) -> BlockShape:
    def kept(units: int, kind: str) -> int:
        return (
            units_kept(units, thresholds.get(f"{name}.{KINDS[kind]}.{kind}", 0.0)) if units else 0
        )

    block = dataclasses.replace(
        block,
        heads=kept(block.heads, "head"),
        qk_dim=kept(block.qk_dim, "qk_dim"),
        v_dim=kept(block.v_dim, "v_dim"),
        hidden=kept(block.hidden, "neuron"),
    )
    return block if block.heads else dataclasses.replace(block, qk_dim=0, v_dim=0)


def _cut_attention(block: Block, shape: BlockShape, scores: Scores, name: str) -> None:
    attn = block.attn
    if attn is None:
        return
    if shape.heads == 0:
        remove_attention(block)
        return
    heads = torch.arange(attn.heads)
    if shape.heads < attn.heads:
        heads = _highest(scores[f"{name}.head"], shape.heads)
        keep_heads(attn, heads)
    if shape.qk_dim < attn.qk_dim:
        keep_qk_dims(attn, _highest(scores[f"{name}.qk_dim"][heads], shape.qk_dim))
    if shape.v_dim < attn.v_dim:
        keep_v_dims(attn, _highest(scores[f"{name}.v_dim"][heads], shape.v_dim))


def _highest(scores: Tensor, kept: int) -> Tensor:
    """Indices, ascending, of the `kept` highest scores along the last dimension."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def _removal_scores(scores: Tensor) -> Tensor:
    """Score of removing a first, second, ... unit, [n] ascending; of dims, one in every head."""
    ordered = scores.sort(dim=-1).values
    return ordered if ordered.dim() == 1 else ordered.sum(dim=0)
