"""The width of a model: channels of the residual stream, removed everywhere at once.

A channel goes out of the patch embedding, the prefix tokens and positions, every norm and
LayerScale, the rows of proj and fc2, the columns of qkv and fc1, and the classifiers. What is left
is the model that normalises over the channels that stay: a LayerNorm's mean and variance are
theirs; in an RMSNorm those that are gone count as zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from timm.layers import LayerScale
from torch import Tensor, nn

from pruners.model.norm import RMS_NORMS, NarrowRMSNorm
from pruners.model.shape import ViTShape
from pruners.model.vit import ViT

_NARROW = (LayerScale, nn.Identity, nn.LayerNorm, NarrowRMSNorm, *RMS_NORMS)


def keep_width(vit: ViT, channels: Tensor) -> None:
    """Keep the residual channels with the given indices [D'].

    Raises:
        ValueError: If a module cannot lose channels, or if a branch writes to some of them only;
            nothing is cut then.
    """
    _check_narrows(vit)
    for name, module in list(_vectors(vit)):
        if isinstance(module, RMS_NORMS):
            owner, _, leaf = name.rpartition(".")
            setattr(vit.vit.get_submodule(owner), leaf, NarrowRMSNorm(module, vit.vit.embed_dim))
    for module, name, axis in list(channel_slices(vit)):
        whole = getattr(module, name)
        part = whole.detach().index_select(axis, channels.to(whole.device)).clone()
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for _, module in _vectors(vit):
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(channels),)
    vit.vit.patch_embed.proj.out_channels = len(channels)
    vit.vit.embed_dim = vit.vit.num_features = vit.vit.head_hidden_size = len(channels)


def channel_slices(vit: ViT) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield (module, parameter, axis) of each parameter that has an axis of residual channels."""
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if getattr(vit.vit, name, None) is not None:
            yield vit.vit, name, 2  # [1, tokens, D]
    writers = [layer for name, layer in vit.linears() if name.endswith(("proj", "fc2"))]
    vectors = [norm for _, norm in _vectors(vit)]
    for module in (vit.vit.patch_embed.proj, *writers, *vectors):
        for name, _ in module.named_parameters():
            yield module, name, 0
    for _, layer in stream_readers(vit):
        yield layer, "weight", 1


def stream_readers(vit: ViT) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) of each linear layer that reads the residual stream."""
    for name, layer in vit.linears():
        if name.endswith(("qkv", "fc1")):
            yield name, layer
    for name, head in _heads(vit):
        if isinstance(head, nn.Linear):
            yield name, head


def narrowed(shape: ViTShape, dim: int) -> ViTShape:
    """Return the shape with `dim` of its residual channels.

    Raises:
        ValueError: If parameters outside the blocks, or of their norms, are not so many per
            channel.
    """
    if dim == shape.dim:
        return shape
    biases = shape.classifiers * shape.classes
    # Norms of q and of k go over a head's width, with as many parameters per dim as per channel.
    heads = 2 * max(block.qk_dim for block in shape.blocks) if shape.qk_norm else 0
    blocks = tuple(
        dataclasses.replace(
            block, attn_out=dim if block.heads else 0, mlp_out=dim if block.hidden else 0
        )
        for block in shape.blocks
    )
    width = shape.dim
    return dataclasses.replace(
        shape,
        dim=dim,
        outer_params=biases + _scaled("outer_params", shape.outer_params - biases, width, dim),
        attn_branch_params=_scaled(
            "attn_branch_params", shape.attn_branch_params, width + heads, dim + heads
        )
        if any(block.heads for block in shape.blocks)
        else shape.attn_branch_params,
        mlp_branch_params=_scaled("mlp_branch_params", shape.mlp_branch_params, width, dim),
        blocks=blocks,
    )


def writes_everywhere(shape: ViTShape) -> bool:
    """Whether every branch that is left writes to all residual channels."""
    return all(
        block.attn_out == (shape.dim if block.heads else 0)
        and block.mlp_out == (shape.dim if block.hidden else 0)
        for block in shape.blocks
    )


def _scaled(name: str, params: int, before: int, after: int) -> int:
    if params % before:
        raise ValueError(
            f"{name} of the shape is not a whole number per channel ({params} for {before}), so "
            "what a narrower model has is unknown; give a model as timm builds it"
        )
    return params // before * after


def _check_narrows(vit: ViT) -> None:
    for index, block in enumerate(vit.blocks):
        if block.attn_rows is not None or block.mlp_rows is not None:
            raise ValueError(
                f"blocks.{index} writes to some residual channels only; cut the width first"
            )
        if block.front is not None or block.middle is not None:
            raise ValueError(f"blocks.{index} reduces the tokens; cut the width first")
    for name, module in _vectors(vit):
        if not isinstance(module, _NARROW):
            raise ValueError(
                f"{name} is a {type(module).__name__}; the width is cut where norms are LayerNorm "
                "or RMSNorm"
            )
        if isinstance(module, RMS_NORMS) and module.weight is None:
            raise ValueError(f"{name} has no weight; the width is cut where norms have one")
    for name, module in _heads(vit):
        if not isinstance(module, nn.Linear | nn.Identity):
            raise ValueError(
                f"{name} is a {type(module).__name__}; the width is cut where it is Linear"
            )


def _heads(vit: ViT) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, classifier)."""
    for name in ("head", "head_dist"):
        if hasattr(vit.vit, name):
            yield name, getattr(vit.vit, name)


def _vectors(vit: ViT) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each norm over the channels, and of each scale of them."""
    yield "patch_embed.norm", vit.vit.patch_embed.norm
    for name in ("norm_pre", "norm", "fc_norm"):
        yield name, getattr(vit.vit, name)
    for index, block in enumerate(vit.blocks):
        for name in ("norm1", "ls1", "norm2", "ls2"):
            if getattr(block, name) is not None:
                yield f"blocks.{index}.{name}", getattr(block, name)
