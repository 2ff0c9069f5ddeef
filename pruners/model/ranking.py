"""Scores of units: their order, and cutting a block down to a shape by them."""

from __future__ import annotations

import torch
from torch import Tensor

from pruners.model.shape import BlockShape
from pruners.model.surgery import (
    keep_heads,
    keep_mlp_writes,
    keep_neurons,
    keep_qk_dims,
    keep_v_dims,
)
from pruners.model.types import Scores
from pruners.model.vit import Block


def slice_scores(scores: Tensor) -> Tensor:
    """Return the scores of removing the weakest unit, the second weakest, ... of a site.

    Of dims one goes in every head: the weakest of each, then the second weakest of each.

    Args:
        scores: [F] of heads, neurons or channels, or [H, K] of dims.

    Returns:
        [F] or [K], ascending.
    """
    ordered = scores.sort(dim=-1).values
    return ordered if ordered.dim() == 1 else ordered.sum(dim=0)


def highest(scores: Tensor, kept: int) -> Tensor:
    """Return the indices, ascending, of the `kept` highest scores along the last dimension.

    Args:
        scores: [..., n].
        kept: How many.

    Returns:
        [..., kept].
    """
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def cut_attention(block: Block, shape: BlockShape, scores: Scores, name: str) -> None:
    """Cut heads, then the same number of dims of each head, to a shape.

    Args:
        block: The block, in place.
        shape: Its shape afterwards.
        scores: Site -> [H] of heads, [H, K] or [H, V] of dims.
        name: What the block's sites of attention begin with.
    """
    attn = block.attn
    if attn is None:
        return
    heads = torch.arange(attn.heads)
    if shape.heads < attn.heads:
        heads = highest(scores[f"{name}.head"], shape.heads)
        keep_heads(attn, heads)
    dims = scores.get(f"{name}.dim")
    if shape.qk_dim < attn.qk_dim:
        by_head = dims if dims is not None else scores[f"{name}.qk_dim"]
        keep_qk_dims(attn, highest(by_head[heads], shape.qk_dim))
    if shape.v_dim < attn.v_dim:
        by_head = dims if dims is not None else scores[f"{name}.v_dim"]
        keep_v_dims(attn, highest(by_head[heads], shape.v_dim))


def cut_mlp(block: Block, shape: BlockShape, scores: Scores, name: str) -> None:
    """Cut neurons, then written channels, to a shape.

    Args:
        block: The block, in place.
        shape: Its shape afterwards.
        scores: Site -> [F] of neurons, [D] of channels.
        name: What the block's sites of the MLP begin with.
    """
    if block.mlp is None:
        return
    if shape.hidden < block.mlp.fc1.out_features:
        keep_neurons(block.mlp, highest(scores[f"{name}.neuron"], shape.hidden))
    if shape.mlp_out < block.mlp.fc2.out_features:
        keep_mlp_writes(block, highest(scores[f"{name}.mlp_out"], shape.mlp_out))
