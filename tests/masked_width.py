"""A Vision Transformer in plain torch, whose residual channels are masked instead of removed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners import PrunableViT


def masked_logits(
    vit: PrunableViT, parameters: Mapping[str, Tensor], images: Tensor, keep: Tensor
) -> Tensor:
    """Return logits [B, classes] of a dense model in which only the channels `keep` [D] exist.

    All weights have their dense shapes. The stream is zero where a channel is gone. A LayerNorm
    takes its mean and variance over the channels that are kept, an RMSNorm sees the zeros.

    Args:
        vit: The dense model, from which only settings are read, no weights.
        parameters: timm's names -> weights.
        images: [B, channels, height, width].
        keep: [D] bool.
    """
    own, mask = vit.vit, keep.to(images.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in parameters:
            return x
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        eps = own.get_submodule(name).eps
        if bias is None:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        x = x - (x * mask).sum(-1, keepdim=True) / mask.sum()
        square = (x.square() * mask).sum(-1, keepdim=True) / mask.sum()
        return (x / (square + eps).sqrt() * weight + bias) * mask

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    weight = parameters["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, parameters.get("patch_embed.proj.bias"), stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2) * mask
    names = ("cls_token", "dist_token", "reg_token")
    prefix = [parameters[n].expand(len(x), -1, -1) for n in names if n in parameters]
    if own.no_embed_class:
        x = torch.cat([*prefix, x + parameters["pos_embed"]], 1)
    else:
        x = torch.cat([*prefix, x], 1) + parameters["pos_embed"]
    x = norm(x * mask, "norm_pre")
    for index, block in enumerate(vit.blocks):
        name = f"blocks.{index}"
        q, k, v = (
            part.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        )
        if f"{name}.attn.q_norm.weight" in parameters:
            q, k = (
                F.layer_norm(
                    part,
                    part.shape[-1:],
                    parameters[f"{name}.attn.{side}_norm.weight"],
                    parameters[f"{name}.attn.{side}_norm.bias"],
                    block.attn.q_norm.eps,
                )
                for part, side in ((q, "q"), (k, "k"))
            )
        mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        branch = linear(mixed.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + branch * parameters.get(f"{name}.ls1.gamma", 1.0) * mask
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        branch = linear(hidden, f"{name}.mlp.fc2")
        x = x + branch * parameters.get(f"{name}.ls2.gamma", 1.0) * mask
    x = norm(x, "norm")
    if "dist_token" in parameters:
        return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    x = x[:, 0] if own.global_pool == "token" else x[:, own.num_prefix_tokens :].mean(1)
    return linear(norm(x, "fc_norm"), "head")
