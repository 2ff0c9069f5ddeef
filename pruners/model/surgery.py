"""Surgery: remove units from a `ViT` so that its matrices become smaller.

A unit is removed together with everything that feeds it and everything it feeds, so the smaller
model equals the model in which the unit was masked. Indices say what is *kept*.
"""

from __future__ import annotations

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from pruners.model.attention import Attention
from pruners.model.shape import BlockShape, ViTShape
from pruners.model.vit import Block, ViT
from pruners.model.width import keep_width


def keep_heads(attn: Attention, heads: Tensor) -> None:
    """Keep the heads with the given indices [H']."""
    qk_rows = _flat_rows(heads, attn.qk_dim)
    v_rows = _flat_rows(heads, attn.v_dim)
    _keep_qkv_rows(attn, qk_rows, v_rows)
    keep_inputs(attn.proj, v_rows)
    attn.heads = len(heads)


def keep_qk_dims(attn: Attention, dims: Tensor) -> None:
    """Keep, in each head, the q/k dims with the given indices [H, K']; the softmax scale stays.

    Raises:
        ValueError: If q and k are normalised over a head's width.
    """
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


def keep_ragged_dims(
    attn: Attention, qk: Tensor, v: Tensor, multiple: int = 1
) -> dict[str, Tensor]:
    """Keep dims whose number differs from head to head; heads without v dims go.

    The heads that stay are padded with zeros to the largest number of dims that one of them keeps,
    rounded up to a multiple; so they stay one batched product, and the softmax scale stays too.

    Args:
        attn: The attention, of at least one head with v dims.
        qk: [H, K] bool, the q/k dims that are kept.
        v: [H, V] bool, the v dims that are kept.
        multiple: What the padded sizes are rounded up to, at most K and V.

    Returns:
        The masks of qkv and proj that keep the padding zero; empty if there is no padding.
    """
    alive = v.any(dim=1).nonzero().flatten()
    if len(alive) < attn.heads:
        keep_heads(attn, alive)
    qk, v = qk[alive], v[alive]
    qk_dims, qk_real = _padded(qk, multiple)
    v_dims, v_real = _padded(v, multiple)
    if qk_dims.shape[1] < attn.qk_dim:
        keep_qk_dims(attn, qk_dims)
    if v_dims.shape[1] < attn.v_dim:
        keep_v_dims(attn, v_dims)
    rows = torch.cat([qk_real.flatten(), qk_real.flatten(), v_real.flatten()])
    if bool(rows.all()):
        return {}
    with torch.no_grad():
        attn.qkv.weight[~rows] = 0.0
        if attn.qkv.bias is not None:
            attn.qkv.bias[~rows] = 0.0
        attn.proj.weight[:, ~v_real.flatten()] = 0.0
    return {
        "qkv": rows.unsqueeze(1).expand_as(attn.qkv.weight).clone(),
        "proj": v_real.flatten().expand_as(attn.proj.weight).clone(),
    }


def padded_size(kept: int, size: int, multiple: int) -> int:
    """Return what the largest head's `kept` of `size` dims are padded to."""
    return min(size, -(-kept // multiple) * multiple)


def keep_attention_writes(block: Block, rows: Tensor) -> None:
    """Let the attention branch write only to the residual channels it writes to at `rows` [D']."""
    if block.attn is not None:
        keep_outputs(block.attn.proj, rows)
        _keep_scale(block.ls1, rows)
        block.attn_rows = _written(block.attn_rows, rows, block.attn.proj)


def keep_mlp_writes(block: Block, rows: Tensor) -> None:
    """Let the MLP branch write only to the residual channels it writes to at `rows` [D']."""
    if block.mlp is not None:
        keep_outputs(block.mlp.fc2, rows)
        _keep_scale(block.ls2, rows)
        block.mlp_rows = _written(block.mlp_rows, rows, block.mlp.fc2)


def remove_attention(block: Block) -> None:
    """Remove the whole attention branch of a block, its bias included."""
    block.norm1 = block.attn = block.ls1 = block.attn_rows = None


def remove_mlp(block: Block) -> None:
    """Remove the whole MLP branch of a block, its bias included."""
    block.norm2 = block.mlp = block.ls2 = block.mlp_rows = None


def keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    """Keep the output features `rows` [n] of a linear layer."""
    _replace(linear, linear.weight[rows], linear.bias[rows] if linear.bias is not None else None)


def keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    """Keep the input features `columns` [n] of a linear layer."""
    _replace(linear, linear.weight[:, columns], linear.bias)


def cut_to_shape(vit: ViT, shape: ViTShape) -> None:
    """Cut units until the model has the given shape.

    Which units stay does not matter: weights are loaded afterwards.

    Raises:
        ValueError: If the model has fewer blocks, channels, heads, dims or neurons than the shape.
    """
    if len(vit.blocks) != len(shape.blocks):
        raise ValueError(
            f"shape has {len(shape.blocks)} blocks; the architecture has {len(vit.blocks)}"
        )
    if not 0 < shape.dim <= vit.vit.embed_dim:
        raise ValueError(
            f"dim of the shape is {shape.dim}; the architecture has {vit.vit.embed_dim} at most"
        )
    if shape.dim < vit.vit.embed_dim:
        keep_width(vit, torch.arange(shape.dim))
    for index, (block, target) in enumerate(zip(vit.blocks, shape.blocks, strict=True)):
        _check_fits(block, target, f"blocks.{index}")
        if target.heads == 0:
            remove_attention(block)
        elif block.attn is not None:
            keep_heads(block.attn, torch.arange(target.heads))
            if target.qk_dim < block.attn.qk_dim:
                keep_qk_dims(block.attn, torch.arange(target.qk_dim).expand(target.heads, -1))
            keep_v_dims(block.attn, torch.arange(target.v_dim).expand(target.heads, -1))
            if target.attn_out < block.attn.proj.out_features:
                keep_attention_writes(block, torch.arange(target.attn_out))
        if target.hidden == 0:
            remove_mlp(block)
        elif block.mlp is not None:
            keep_neurons(block.mlp, torch.arange(target.hidden))
            if target.mlp_out < block.mlp.fc2.out_features:
                keep_mlp_writes(block, torch.arange(target.mlp_out))


def _check_fits(block: Block, target: BlockShape, name: str) -> None:
    attn, mlp = block.attn, block.mlp
    have = {
        "heads": attn.heads if attn is not None else 0,
        "qk_dim": attn.qk_dim if attn is not None else 0,
        "v_dim": attn.v_dim if attn is not None else 0,
        "attn_out": attn.proj.out_features if attn is not None else 0,
        "hidden": mlp.fc1.out_features if mlp is not None else 0,
        "mlp_out": mlp.fc2.out_features if mlp is not None else 0,
    }
    for key, most in have.items():
        if getattr(target, key) > most:
            raise ValueError(
                f"{name} of the shape has {key} = {getattr(target, key)}; "
                f"the architecture has {most} at most"
            )


def _padded(kept: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return indices [H, M], kept dims first, and a bool mask [H, M] of those that are kept."""
    size = padded_size(int(kept.sum(dim=1).max()), kept.shape[1], multiple)
    if size == kept.shape[1]:  # nothing is cut, so nothing may change its place
        return torch.arange(size, device=kept.device).expand_as(kept), kept
    order = torch.argsort(kept.to(torch.uint8), dim=1, descending=True, stable=True)[:, :size]
    return order, kept.gather(1, order)


def _written(before: Tensor | None, rows: Tensor, layer: nn.Linear) -> Tensor:
    """Channels that are written now, on the layer's device."""
    now = rows if before is None else before[rows.to(before.device)]
    return now.to(layer.weight.device)


def _keep_scale(scale: nn.Module | None, rows: Tensor) -> None:
    if isinstance(scale, LayerScale):
        trains = scale.gamma.requires_grad
        scale.gamma = nn.Parameter(scale.gamma.detach()[rows].clone(), requires_grad=trains)


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
