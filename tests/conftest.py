from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import PrunableViT

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


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., PrunableViT]:
    """Builds a tiny model whose every parameter is random, so that no term is silently zero."""

    def build(**args: object) -> PrunableViT:
        torch.manual_seed(1)
        args = {**TINY, **args}
        vit = PrunableViT.from_state_dict(VisionTransformer(**args).state_dict(), **args)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        return vit.eval()

    return build


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(6, 3, 24, 16, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(3)
    ]


def images_for(vit: PrunableViT, count: int = 3) -> Tensor:
    shape = vit.shape()
    return torch.randn(
        count, shape.channels, *shape.image, generator=torch.Generator().manual_seed(3)
    )
