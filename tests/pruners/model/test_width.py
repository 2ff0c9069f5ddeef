"""A narrower model against a dense one whose channels are masked, in float64 and plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruners import PrunableViT, cost_of
from pruners.model.surgery import (
    cut_to_shape,
    keep_attention_writes,
    keep_heads,
    keep_neurons,
    keep_v_dims,
    remove_attention,
    remove_mlp,
)
from pruners.model.width import channel_slices, keep_width, narrowed, writes_everywhere
from tests.masked_width import masked_logits
from tests.models import TINY, VARIANTS, images_for

MORE = {
    "distilled": {},
    "rms_norm": {"norm_layer": "rmsnorm", "qk_norm": False},
    "pooled_fc_norm": {"class_token": False, "global_pool": "avg", "fc_norm": True},
}


def build(variant: str, tiny) -> PrunableViT:
    if variant != "distilled":
        return tiny(**(VARIANTS | MORE)[variant])
    torch.manual_seed(2)
    sizes = {key: TINY[key] for key in ("embed_dim", "depth", "num_heads", "num_classes")}
    vit = PrunableViT.from_timm(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, **sizes
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return vit.eval()


def mask_of(channels: torch.Tensor, dim: int = 24) -> torch.Tensor:
    mask = torch.zeros(dim, dtype=torch.bool)
    mask[channels] = True
    return mask


@pytest.mark.parametrize("kept", [24, 17, 1])
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE])
def test_masked_equals_smaller(variant: str, kept: int, tiny, tmp_path) -> None:
    vit = build(variant, tiny).double()
    dense, images = copy.deepcopy(vit), images_for(vit).double()
    generator = torch.Generator().manual_seed(kept)
    channels = torch.randperm(24, generator=generator)[:kept].sort().values
    keep_width(vit, channels)
    with torch.no_grad():
        own = dict(dense.vit.named_parameters())
        expected = masked_logits(dense, own, images, mask_of(channels))
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-10)
        if kept < 24:
            assert (expected - dense(images)).abs().max() > 1e-2
    assert vit.shape() == narrowed(dense.shape(), kept)


@pytest.mark.parametrize("variant", [*VARIANTS, *MORE])
def test_costs_are_exact_whatever_else_is_cut(variant: str, tiny) -> None:
    vit = build(variant, tiny)
    remove_attention(vit.blocks[0])
    remove_mlp(vit.blocks[1])
    keep_heads(vit.blocks[2].attn, torch.tensor([2]))
    keep_neurons(vit.blocks[2].mlp, torch.arange(11))
    predicted = narrowed(vit.shape(), 10)
    keep_width(vit, torch.arange(3, 13))
    cost = cost_of(vit.shape())
    assert vit.shape() == predicted
    assert cost.params == sum(parameter.numel() for parameter in vit.parameters())
    vit.use_fused_attention(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, count=1))
    assert 2 * cost.macs == counter.get_total_flops()


def test_every_axis_of_channels_is_named(tiny) -> None:
    """No axis of the width's size is forgotten: 23 is the size of nothing else."""
    vit = tiny(embed_dim=23, num_heads=1, reg_tokens=2, init_values=0.5, pre_norm=True)
    for block in vit.blocks:
        keep_v_dims(block.attn, torch.arange(20).unsqueeze(0))
    named = {(id(getattr(module, name)), axis) for module, name, axis in channel_slices(vit)}
    found = {
        (id(parameter), axis)
        for parameter in vit.parameters()
        for axis, size in enumerate(parameter.shape)
        if size == 23
    }
    assert named == found


def test_a_saved_model_opens_again(tiny, tmp_path) -> None:
    vit = build("registers", tiny)
    keep_width(vit, torch.tensor([1, 4, 5, 9, 20]))
    keep_attention_writes(vit.blocks[1], torch.tensor([0, 3]))
    vit.save(tmp_path)
    again, images = PrunableViT.load(tmp_path).eval(), images_for(vit)
    assert again.shape() == vit.shape()
    assert again.vit.num_features == again.vit.embed_dim == 5
    with torch.no_grad():
        assert torch.equal(again(images), vit(images))


def test_a_frozen_parameter_stays_frozen_and_sizes_follow(tiny) -> None:
    vit = tiny()
    vit.vit.pos_embed.requires_grad_(False)
    keep_width(vit, torch.arange(7))
    assert not vit.vit.pos_embed.requires_grad
    assert vit.vit.cls_token.requires_grad
    assert (vit.vit.patch_embed.proj.out_channels, vit.vit.head.in_features) == (7, 7)
    assert vit.vit.norm.normalized_shape == (7,)
    assert vit.blocks[1].mlp.fc2.out_features == vit.blocks[1].attn.qkv.in_features == 7


def test_what_cannot_be_narrowed_is_refused_by_name_and_left_as_it_was(tiny) -> None:
    vit = tiny()
    keep_attention_writes(vit.blocks[2], torch.arange(9))
    assert not writes_everywhere(vit.shape())
    with pytest.raises(ValueError, match=r"blocks\.2 writes to some residual channels only"):
        keep_width(vit, torch.arange(9))
    for damage, message in (
        (lambda v: setattr(v.vit, "head", torch.nn.Sequential(v.vit.head)), "head is a Sequential"),
        (lambda v: setattr(v.vit, "norm", torch.nn.BatchNorm1d(24)), "norm is a BatchNorm1d"),
        (
            lambda v: setattr(v.vit, "norm", torch.nn.RMSNorm(24, elementwise_affine=False)),
            "norm has no weight",
        ),
    ):
        vit = tiny()
        damage(vit)
        with pytest.raises(ValueError, match=message):
            keep_width(vit, torch.arange(9))
        assert vit.shape().dim == 24
    shape = tiny().shape()
    narrow = tiny()
    keep_width(narrow, torch.arange(9))
    with pytest.raises(ValueError, match="dim of the shape is 24; the architecture has 9 at most"):
        cut_to_shape(narrow, shape)


def test_a_shape_with_other_parameters_than_channels_have_is_refused(tiny) -> None:
    vit = tiny()
    vit.vit.head = torch.nn.Linear(24, 5, bias=False)  # timm's have one
    with pytest.raises(ValueError, match="outer_params of the shape is not a whole number per"):
        narrowed(vit.shape(), 12)
