"""Small models for all tests."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import Plan, PrunableViT, Step, load_method

TINY = {
    "img_size": (24, 16),  # not square, so that heights and widths cannot be confused
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}

VARIANTS: dict[str, dict[str, object]] = {
    "vit": {},
    "layer_scale": {"init_values": 0.3, "no_embed_class": True},
    "registers": {"reg_tokens": 2, "init_values": 0.5},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "qk_norm": {"qk_norm": True},
    "grey_no_bias": {"in_chans": 1, "qkv_bias": False, "pre_norm": True},
}


def build_tiny(**args: object) -> PrunableViT:
    """Build a tiny model whose every parameter is random, so that no term is silently zero."""
    torch.manual_seed(1)
    args = {**TINY, **args}
    vit = PrunableViT.from_state_dict(VisionTransformer(**args).state_dict(), **args)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return vit.eval()


def images_for(vit: PrunableViT, count: int = 3) -> Tensor:
    shape = vit.shape()
    return torch.randn(
        count, shape.channels, *shape.image, generator=torch.Generator().manual_seed(3)
    )


def cut(vit: PrunableViT) -> PrunableViT:
    """A model with all that pruning leaves: uneven blocks, lost branches, merged tokens, zeros."""
    units = {
        "blocks.0.attn.head": 0.34,
        "blocks.1.attn.head": 1.0,
        "blocks.1.mlp.neuron": 0.3,
        "blocks.2.mlp.neuron": 1.0,
    }
    steps = (
        Step(
            pruner=load_method("grouped", criterion="magnitude", compensate=False),
            thresholds=units,
        ),
        Step(pruner=load_method("tome"), thresholds={"blocks.0.token": 0.3}),
        Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1": 0.5}),
    )
    Plan(steps=steps).apply(vit)
    return vit
