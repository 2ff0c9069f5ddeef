from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import PrunableViT
from pruners.model.surgery import (
    cut_to_shape,
    keep_attention_writes,
    keep_heads,
    keep_mlp_writes,
    keep_neurons,
    keep_qk_dims,
    keep_ragged_dims,
    keep_v_dims,
    remove_attention,
    remove_mlp,
)
from tests.models import TINY, VARIANTS, images_for


def zero_rows(layer: torch.nn.Linear, rows: torch.Tensor) -> None:
    layer.weight[rows] = 0.0
    if layer.bias is not None:
        layer.bias[rows] = 0.0


def dropped(count: int, kept: torch.Tensor) -> torch.Tensor:
    alive = set(kept.tolist())
    return torch.tensor([i for i in range(count) if i not in alive], dtype=torch.long)


@torch.no_grad()
def mask_units(vit: PrunableViT, index: int, heads, qk, v, neurons) -> None:
    """Zeroes the weights of all that is not kept; an implementation of its own, row by row."""
    attn, mlp = vit.blocks[index].attn, vit.blocks[index].mlp
    k_start, v_start = attn.heads * attn.qk_dim, 2 * attn.heads * attn.qk_dim
    for head in range(attn.heads):
        alive = head in heads.tolist()
        row = heads.tolist().index(head) if alive else -1
        for dim in range(attn.v_dim):
            if not alive or dim not in v[row].tolist():
                zero_rows(attn.qkv, torch.tensor([v_start + head * attn.v_dim + dim]))
        for dim in range(attn.qk_dim):
            if not alive or dim not in qk[row].tolist():
                zero_rows(attn.qkv, torch.tensor([head * attn.qk_dim + dim]))
                zero_rows(attn.qkv, torch.tensor([k_start + head * attn.qk_dim + dim]))
    zero_rows(mlp.fc1, dropped(mlp.fc1.out_features, neurons))


def random_choice(count: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:kept].sort().values


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masked_equals_smaller(variant: str, seed: int, fused: bool, tiny) -> None:
    masked = tiny(**VARIANTS[variant])
    masked.use_fused_attention(fused)
    smaller = copy.deepcopy(masked)
    generator = torch.Generator().manual_seed(seed)
    qk_cut = variant != "qk_norm"
    for index, block in enumerate(smaller.blocks):
        attn, mlp = block.attn, block.mlp
        heads = random_choice(attn.heads, 2, generator)
        qk_width = 3 if qk_cut else attn.qk_dim
        qk = torch.stack([random_choice(attn.qk_dim, qk_width, generator) for _ in heads])
        v = torch.stack([random_choice(attn.v_dim, 5, generator) for _ in heads])
        neurons = random_choice(mlp.fc1.out_features, 37, generator)
        mask_units(masked, index, heads, qk, v, neurons)
        keep_heads(attn, heads)
        if qk_cut:
            keep_qk_dims(attn, qk)
        keep_v_dims(attn, v)
        keep_neurons(mlp, neurons)
    images = images_for(masked)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), masked(images), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(
        p.numel() for p in masked.parameters()
    )
    block = smaller.shape().blocks[0]
    assert (block.heads, block.v_dim, block.hidden) == (2, 5, 37)
    assert tuple(smaller.blocks[0].attn.qkv.weight.shape) == (2 * (2 * block.qk_dim + 5), 24)
    assert tuple(smaller.blocks[0].attn.proj.weight.shape) == (24, 2 * 5)


def test_the_softmax_scale_is_preserved(tiny) -> None:
    vit = tiny()
    scale = vit.blocks[0].attn.scale
    masked = copy.deepcopy(vit)
    dims = torch.tensor([[0, 5], [1, 2], [3, 7]])
    mask_units(masked, 0, torch.arange(3), dims, torch.arange(8).expand(3, -1), torch.arange(96))
    keep_qk_dims(vit.blocks[0].attn, dims)
    assert vit.blocks[0].attn.scale == scale
    images = images_for(vit)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), masked(images), rtol=0, atol=1e-5)
        vit.blocks[0].attn.scale = vit.blocks[0].attn.qk_dim ** -0.5  # what timm would use
        assert (vit(images) - masked(images)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_removed_branches_equal_branches_that_add_nothing(variant: str, tiny) -> None:
    masked = tiny(**VARIANTS[variant])
    smaller = copy.deepcopy(masked)
    with torch.no_grad():
        for layer in (masked.blocks[0].attn.proj, masked.blocks[2].mlp.fc2):
            zero_rows(layer, torch.arange(layer.out_features))
    remove_attention(smaller.blocks[0])
    remove_mlp(smaller.blocks[2])
    images = images_for(masked)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), masked(images), rtol=0, atol=1e-5)
    assert smaller.shape().blocks[0].heads == 0
    assert smaller.shape().blocks[2].hidden == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("multiple", [1, 4])
def test_ragged_heads_equal_masked_ones(variant: str, fused: bool, multiple: int, tiny) -> None:
    masked = tiny(**VARIANTS[variant])
    masked.use_fused_attention(fused)
    smaller = copy.deepcopy(masked)
    v = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1], [0] * 8, [0, 0, 1, 0, 0, 0, 0, 1]]).bool()
    qk = v if variant != "qk_norm" else torch.ones_like(v)
    attn = masked.blocks[1].attn
    rows = torch.cat([qk.flatten(), qk.flatten(), v.flatten()])
    with torch.no_grad():
        zero_rows(attn.qkv, (~rows).nonzero().flatten())
    masks = keep_ragged_dims(smaller.blocks[1].attn, qk, v, multiple)
    images = images_for(masked)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), masked(images), rtol=0, atol=1e-5)
        assert (smaller.blocks[1].attn.qkv.weight == 0).logical_or(masks["qkv"]).all()
    block = smaller.shape().blocks[1]
    assert (block.heads, block.v_dim) == (2, 4)
    assert int(masks["proj"].sum()) == 24 * (4 + 2)


def test_padding_stays_zero_while_training(tiny) -> None:
    vit = tiny()
    v = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [0] * 6 + [1] * 2]).bool()
    for layer, mask in keep_ragged_dims(vit.blocks[0].attn, v, v).items():
        vit.masks[f"blocks.0.attn.{layer}"] = mask
    optimizer = torch.optim.AdamW(vit.parameters(), lr=0.1)
    vit(images_for(vit)).square().sum().backward()
    optimizer.step()  # no masks are applied: the padding gets no gradient at all
    qkv, proj = vit.blocks[0].attn.qkv, vit.blocks[0].attn.proj
    assert not qkv.weight[~vit.masks["blocks.0.attn.qkv"]].any()
    assert not qkv.bias[~vit.masks["blocks.0.attn.qkv"].any(dim=1)].any()
    assert not proj.weight[~vit.masks["blocks.0.attn.proj"]].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_that_are_not_written_equal_masked_ones(variant: str, tiny, tmp_path) -> None:
    masked = tiny(**VARIANTS[variant])
    smaller = copy.deepcopy(masked)
    rows = torch.randperm(24)[:15].sort().values
    kept = torch.tensor([2, 3, 7, 11, 14])  # the second cut counts among the channels left
    keep_attention_writes(smaller.blocks[0], rows)
    keep_attention_writes(smaller.blocks[0], kept)
    keep_mlp_writes(smaller.blocks[2], rows)
    with torch.no_grad():
        zero_rows(masked.blocks[0].attn.proj, dropped(24, rows[kept]))
        zero_rows(masked.blocks[2].mlp.fc2, dropped(24, rows))
    images = images_for(masked)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), masked(images), rtol=0, atol=1e-5)
    assert smaller.shape().blocks[0].attn_out == 5
    assert smaller.shape().blocks[2].mlp_out == 15
    smaller.save(tmp_path)
    assert torch.equal(PrunableViT.load(tmp_path).eval()(images), smaller(images))


def test_a_whole_block_can_go(tiny) -> None:
    vit = tiny()
    shorter = copy.deepcopy(vit)
    remove_attention(vit.blocks[1])
    remove_mlp(vit.blocks[1])
    del shorter.vit.blocks[1]
    images = images_for(vit)
    with torch.no_grad():
        assert torch.equal(vit(images), shorter(images))


def test_qk_dims_are_refused_where_q_and_k_are_normalised(tiny) -> None:
    with pytest.raises(ValueError, match="q_norm is a LayerNorm"):
        keep_qk_dims(tiny(qk_norm=True).blocks[0].attn, torch.tensor([[0], [1], [2]]))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(0, 3),
    qk_dim=st.integers(1, 8),
    v_dim=st.integers(1, 8),
    hidden=st.integers(0, 96),
    attn_out=st.integers(1, 24),
    mlp_out=st.integers(1, 24),
)
def test_cutting_to_a_shape_gives_that_shape(
    heads: int, qk_dim: int, v_dim: int, hidden: int, attn_out: int, mlp_out: int
) -> None:
    import dataclasses

    from timm.models.vision_transformer import VisionTransformer

    vit = PrunableViT(VisionTransformer(**TINY, weight_init="skip"))
    shape = vit.shape()
    block = dataclasses.replace(
        shape.blocks[1],
        heads=heads,
        qk_dim=qk_dim if heads else 0,
        v_dim=v_dim if heads else 0,
        hidden=hidden,
        attn_out=attn_out if heads else 0,
        mlp_out=mlp_out if hidden else 0,
    )
    target = dataclasses.replace(shape, blocks=(shape.blocks[0], block, shape.blocks[2]))
    cut_to_shape(vit, target)
    assert vit.shape() == target


def test_a_shape_larger_than_the_model_is_refused(tiny) -> None:
    vit = tiny()
    shape = vit.shape()
    keep_neurons(vit.blocks[2].mlp, torch.arange(10))
    with pytest.raises(ValueError, match=r"blocks\.2.*96"):
        cut_to_shape(vit, shape)


def test_frozen_layers_stay_frozen(tiny) -> None:
    vit = tiny()
    vit.blocks[0].mlp.requires_grad_(False)
    keep_neurons(vit.blocks[0].mlp, torch.tensor([3, 1]))
    assert not vit.blocks[0].mlp.fc1.weight.requires_grad
    assert vit.blocks[1].mlp.fc1.weight.requires_grad


def test_padding_up_to_the_full_width_leaves_dims_where_they_are(tiny) -> None:
    """Heads that keep 5 and 7 of 8 dims, rounded up to 8: what is kept must not be zeroed."""
    vit, images = tiny(), images_for(tiny())
    attn = vit.blocks[1].attn
    kept = torch.ones(3, 8, dtype=torch.bool)
    kept[0, [1, 2, 6]] = False
    kept[2, 4] = False
    rows = torch.cat([kept.flatten()] * 3)
    masked = copy.deepcopy(vit)
    with torch.no_grad():
        masked.blocks[1].attn.qkv.weight[~rows] = 0.0
        masked.blocks[1].attn.qkv.bias[~rows] = 0.0
    keep_ragged_dims(attn, kept, kept, multiple=4)
    torch.testing.assert_close(vit(images), masked(images), atol=1e-6, rtol=0)
