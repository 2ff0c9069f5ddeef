"""Surgery: remove units from a `PrunableViT` so that its matrices become smaller.

A unit is removed together with everything that feeds it and everything it feeds, so the smaller
model equals the model in which the unit was masked. Indices say what is *kept*.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from pruners.attention import Attention
from pruners.shape import ViTShape
from pruners.vit import Block, PrunableViT


def keep_heads(attn: Attention, heads: Tensor) -> None:
    """Keep the heads with the given indices [H']."""
    qk_rows = _flat_rows(heads, attn.qk_dim)
    v_rows = _flat_rows(heads, attn.v_dim)
    _keep_qkv_rows(attn, qk_rows, v_rows)
    keep_inputs(attn.proj, v_rows)
    attn.heads = len(heads)


def keep_qk_dims(attn: Attention, dims: Tensor) -> None:
    """Keep, in each head, the q/k dims with the given indices [H, K']; the softmax scale stays."""
    if not isinstance(attn.q_norm, nn.Identity):
        raise ValueError(
            f"attn.q_norm is a {type(attn.q_norm).__name__}; "
            "q/k dims cannot be cut where q and k are normalised"
        )
    qk_rows = (dims + _head_starts(attn.heads, attn.qk_dim, dims)).flatten()
    v_rows = torch.arange(attn.heads * attn.v_dim, device=dims.device)
    _keep_qkv_rows(attn, qk_rows, v_rows)
    attn.qk_dim = dims.shape[1]


def keep_v_dims(attn: Attention, dims: Tensor) -> None:
    """Keep, in each head, the v dims with the given indices [H, V']."""
    v_rows = (dims + _head_starts(attn.heads, attn.v_dim, dims)).flatten()
    _keep_qkv_rows(attn, torch.arange(attn.heads * attn.qk_dim, device=dims.device), v_rows)
    keep_inputs(attn.proj, v_rows)
    attn.v_dim = dims.shape[1]


def keep_neurons(mlp: Mlp, neurons: Tensor) -> None:
    """Keep the MLP neurons with the given indices [F']."""
    keep_outputs(mlp.fc1, neurons)
    keep_inputs(mlp.fc2, neurons)


def remove_attention(block: Block) -> None:
    """Remove the whole attention branch of a block, its bias included."""
    block.norm1 = block.attn = block.ls1 = None


def remove_mlp(block: Block) -> None:
    """Remove the whole MLP branch of a block, its bias included."""
    block.norm2 = block.mlp = block.ls2 = None


def keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    """Keep the output features `rows` of a linear layer."""
    _replace(linear, linear.weight[rows], linear.bias[rows] if linear.bias is not None else None)


def keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    """Keep the input features `columns` of a linear layer."""
    _replace(linear, linear.weight[:, columns], linear.bias)


def cut_to_shape(vit: PrunableViT, shape: ViTShape) -> None:
    """Cut units until the model has the given shape.

    Which units stay does not matter: weights are loaded afterwards.

    Raises:
        ValueError: If the model has fewer blocks, heads, dims or neurons than the shape.
    """
    if len(vit.blocks) != len(shape.blocks):
        raise ValueError(
            f"shape has {len(shape.blocks)} blocks; the architecture has {len(vit.blocks)}"
        )
    for index, (block, target) in enumerate(zip(vit.blocks, shape.blocks, strict=True)):
        _check_fits(
            block, target.heads, target.qk_dim, target.v_dim, target.hidden, f"blocks.{index}"
        )
        if target.heads == 0:
            remove_attention(block)
        elif block.attn is not None:
            keep_heads(block.attn, torch.arange(target.heads))
            if target.qk_dim < block.attn.qk_dim:
                keep_qk_dims(block.attn, torch.arange(target.qk_dim).expand(target.heads, -1))
            keep_v_dims(block.attn, torch.arange(target.v_dim).expand(target.heads, -1))
        if target.hidden == 0:
            remove_mlp(block)
        elif block.mlp is not None:
            keep_neurons(block.mlp, torch.arange(target.hidden))


def _check_fits(block: Block, heads: int, qk_dim: int, v_dim: int, hidden: int, name: str) -> None:
    attn, mlp = block.attn, block.mlp
    have = (
        (attn.heads, attn.qk_dim, attn.v_dim) if attn is not None else (0, 0, 0),
        mlp.fc1.out_features if mlp is not None else 0,
    )
    if heads > have[0][0] or qk_dim > have[0][1] or v_dim > have[0][2] or hidden > have[1]:
        raise ValueError(
            f"{name} of the shape has heads, qk_dim, v_dim, hidden = "
            f"{heads}, {qk_dim}, {v_dim}, {hidden}; "
            f"the architecture has {(*have[0], have[1])} at most"
        )


def _head_starts(heads: int, width: int, like: Tensor) -> Tensor:
    """First row of each head, [H, 1]."""
    return (torch.arange(heads, device=like.device) * width).unsqueeze(1)


def _flat_rows(heads: Tensor, width: int) -> Tensor:
    """Rows of the given heads, in order: [len(heads) * width]."""
    return (heads.unsqueeze(1) * width + torch.arange(width, device=heads.device)).flatten()


def _keep_qkv_rows(attn: Attention, qk_rows: Tensor, v_rows: Tensor) -> None:
    k_start = attn.heads * attn.qk_dim
    keep_outputs(attn.qkv, torch.cat([qk_rows, k_start + qk_rows, 2 * k_start + v_rows]))


def _replace(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
    if bias is not None and linear.bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = weight.shape
