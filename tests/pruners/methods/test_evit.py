from __future__ import annotations

import math

import pytest
import torch

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.methods.evit import EViTReducer
from pruners.model.tokens import Tokens
from tests.models import images_for

SITE = "blocks.0.token"


def attention_probabilities(vit: PrunableViT, index: int, x: torch.Tensor) -> torch.Tensor:
    """Full attention [B, H, N, N] of a block, from its weights, written out."""
    block = vit.blocks[index]
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))
    width = attn.heads * attn.qk_dim
    q = qkv[..., :width].unflatten(-1, (attn.heads, -1))
    k = qkv[..., width : 2 * width].unflatten(-1, (attn.heads, -1))
    logits = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(attn.qk_dim)
    return logits.softmax(-1)


def tokens_between_branches(
    vit: PrunableViT, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that enter block 0, and those after its attention's residual addition."""
    x = vit.vit._pos_embed(vit.vit.patch_embed(images))
    block = vit.blocks[0]
    return x, x + block.ls1(block.attn(block.norm1(x)).output)


def reduce(vit: PrunableViT, share: float, images: torch.Tensor, **options) -> torch.Tensor:
    block = vit.blocks[0]
    (reducer,) = load_method("evit", **options).reducers(vit.shape(), {SITE: share}).values()
    x, after = tokens_between_branches(vit, images)
    return reducer(Tokens(after), block.attn(block.norm1(x)), block.attn.scale).x


@pytest.mark.parametrize("registers", [0, 2])
def test_keeps_what_the_class_token_attends_to_and_fuses_the_rest(registers: int, tiny) -> None:
    vit = tiny(reg_tokens=registers, img_size=(48, 32))
    prefix, patches, share = 1 + registers, 24, 0.3
    images = images_for(vit)
    x, after = tokens_between_branches(vit, images)
    attentiveness = attention_probabilities(vit, 0, x)[:, :, 0, prefix:].mean(1)
    reduced = reduce(vit, share, images)
    kept = math.ceil((1 - share) * patches)
    assert reduced.shape[1] == prefix + kept + 1
    for image in range(len(images)):
        order = attentiveness[image].argsort(descending=True)
        body = after[image, prefix:]
        torch.testing.assert_close(reduced[image, :prefix], after[image, :prefix])
        torch.testing.assert_close(reduced[image, prefix:-1], body[order[:kept]])
        rest = order[kept:]
        fused = sum(attentiveness[image, i] * body[i] for i in rest)
        torch.testing.assert_close(reduced[image, -1], fused)


def test_without_fusion_the_rest_is_gone(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    images = images_for(vit)
    fused, gone = reduce(vit, 0.5, images), reduce(vit, 0.5, images, fuse=False)
    assert gone.shape[1] == 1 + 12
    assert torch.equal(fused[:, :-1], gone)


def test_pooled_models_use_the_attention_received(tiny) -> None:
    vit = tiny(class_token=False, global_pool="avg", img_size=(48, 32))
    images = images_for(vit)
    x, after = tokens_between_branches(vit, images)
    received = attention_probabilities(vit, 0, x).mean(dim=(1, 2))
    reduced = reduce(vit, 0.25, images)
    for image in range(len(images)):
        best = received[image].argsort(descending=True)[:18]
        torch.testing.assert_close(reduced[image, :18], after[image, best])


def test_fused_and_unfused_attention_keep_the_same_tokens(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    evit = load_method("evit")
    evit.cut(vit, {}, {"blocks.0.token": 0.3, "blocks.1.token": 0.4})
    images = images_for(vit)
    with torch.no_grad():
        vit.use_fused_attention(True)
        fused = vit(images)
        vit.use_fused_attention(False)
        torch.testing.assert_close(fused, vit(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "gmacs"), [(0.9, 4.02), (0.8, 3.48), (0.7, 3.03), (0.6, 2.64), (0.5, 2.31)]
)
def test_published_macs_of_deit_small(keep: float, gmacs: float) -> None:
    shape = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).shape()
    places = {f"blocks.{i}.token": 1 - keep for i in (3, 6, 9)}
    shrunk = load_method("evit").shrink(shape, places)
    assert cost_of(shrunk).gmacs == pytest.approx(gmacs, abs=0.006)
    if keep == 0.7:
        assert [shrunk.blocks[i].mlp_tokens for i in (3, 6, 9)] == [140, 100, 72]


def test_allocation_is_the_papers_places(tiny) -> None:
    shape = tiny(depth=12, img_size=(80, 80)).shape()
    evit = load_method("evit")
    thresholds = evit.allocate(shape, {}, 0.7 * cost_of(shape).macs)
    assert set(thresholds) == {"blocks.3.token", "blocks.6.token", "blocks.9.token"}
    assert len(set(thresholds.values())) == 1


def test_tokens_really_flow_less_and_are_recorded(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    seen: list[int] = []
    for block in vit.blocks:
        block.mlp.register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].shape[1])
        )
    Plan(steps=(Step(pruner=load_method("evit"), thresholds={"blocks.0.token": 0.5}),)).apply(vit)
    vit(images_for(vit))
    assert seen == [14, 14, 14]
    assert [b.mlp_tokens for b in vit.shape().blocks] == seen


def test_reducing_twice_is_refused(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    evit = load_method("evit")
    evit.cut(vit, {}, {"blocks.0.token": 0.5})
    with pytest.raises(ValueError, match="reduce tokens only once"):
        evit.cut(vit, {}, {"blocks.1.token": 0.5})


def test_blocks_without_attention_have_no_site(tiny) -> None:
    vit = tiny()
    load_method("grouped", criterion="magnitude").cut(vit, {}, {"blocks.1.attn.head": 1.0})
    assert list(load_method("evit").sites(vit.shape())) == ["blocks.0.token", "blocks.2.token"]


def test_dropping_a_single_patch_for_a_fused_one_is_not_done(tiny) -> None:
    vit = tiny()  # 6 patches: ceil(0.8 * 6) = 5 would stay
    shape = load_method("evit").shrink(vit.shape(), {"blocks.0.token": 0.2})
    assert cost_of(shape) == cost_of(vit.shape())
    gone = load_method("evit", fuse=False).shrink(vit.shape(), {"blocks.0.token": 0.2})
    assert gone.blocks[0].mlp_tokens == 6


def test_the_ramp_starts_at_everything_and_ends_at_its_share(tiny) -> None:
    evit, thresholds = load_method("evit", ramp_epochs=4), {SITE: 0.4}
    shares = [evit.ramped(thresholds, epoch)[SITE] for epoch in range(7)]
    for epoch, share in enumerate(shares):  # the kept share as the paper writes it
        kappa = 0.6 + 0.4 * (1 + math.cos(math.pi * min(1, epoch / 4))) / 2
        assert 1 - share == pytest.approx(kappa)
    assert shares[0] == 0.0
    assert shares[4:] == [0.4] * 3
    vit = tiny(img_size=(48, 32))
    plan = Plan(steps=(Step(pruner=evit, thresholds=thresholds),))
    plan.apply(vit)
    tokens = [vit.shape().blocks[0].mlp_tokens]
    for epoch in range(1, 6):
        plan.ramp(vit, (), epoch)
        tokens.append(vit.shape().blocks[0].mlp_tokens)
    assert tokens[0] == 25
    assert tokens == sorted(tokens, reverse=True)
    assert vit.shape() == plan.shape(tiny(img_size=(48, 32)).shape())
    with pytest.raises(ValueError, match="ramp_epochs of evit is -1; give a whole number, at le"):
        load_method("evit", ramp_epochs=-1)


def test_keeping_everything_equals_the_dense_model(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    images = images_for(vit)
    expected = vit(images)
    for block in range(3):
        reducer = EViTReducer(vit.shape(), block, 0.0, fuse=True)
        vit.blocks[block].middle = reducer
    assert torch.equal(vit(images), expected)
