"""What all merging methods share, whichever patches they choose."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pruners import Plan, PrunableViT, Step, cost_of, load_method, method_names
from pruners.families.merging import MergingPruner, MergingReducer
from pruners.model.attention import Attended
from pruners.model.tokens import Tokens
from tests.models import VARIANTS, build_tiny, images_for

METHODS = [name for name in method_names() if isinstance(load_method(name), MergingPruner)]
SITE = "blocks.0.token"
LARGE = {"img_size": (48, 32)}  # 24 patches

pytestmark = pytest.mark.parametrize("method", METHODS)


def reducer_of(method: str, prefix: int, patches: int, merged: int) -> MergingReducer:
    """A reducer of a model with so many prefix tokens and one row of patches."""
    sizes = {"img_size": (8, 8 * patches), "class_token": prefix > 0, "reg_tokens": prefix - 1}
    if prefix == 0:
        sizes |= {"reg_tokens": 0, "global_pool": "avg"}
    pruner = load_method(method)
    assert isinstance(pruner, MergingPruner)
    return pruner.reducer(build_tiny(**sizes).shape(), 0, merged)


def attended(prefix: int, patches: int, dtype: torch.dtype = torch.float32) -> Attended:
    query, key = torch.randn(2, 2, 3, prefix + patches, 8).to(dtype)
    return Attended(output=key, query=query, key=key)


@given(
    patches=st.integers(2, 12),
    prefix=st.integers(0, 3),
    wanted=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_sizes_are_conserved_and_the_prefix_stays(method, patches, prefix, wanted, seed) -> None:
    merged = min(wanted, patches // 2)
    reducer = reducer_of(method, prefix, patches, merged)
    torch.manual_seed(seed)
    x = torch.randn(2, prefix + patches, 24)
    size = torch.randint(1, 5, (2, prefix + patches)).float()
    size[:, :prefix] = 1.0
    out = reducer(Tokens(x, size), attended(prefix, patches), 0.5)
    assert out.x.shape == (2, prefix + patches - merged, 24)
    assert reducer.tokens_after(prefix + patches) == out.x.shape[1]
    assert torch.equal(out.size.sum(1), size.sum(1))
    assert torch.equal(out.x[:, :prefix], x[:, :prefix])
    assert torch.equal(out.size[:, :prefix], size[:, :prefix])
    # A token that took none in is one of those that came, bit for bit, with its size.
    for image in range(2):
        came = {tuple(row.tolist()): s for row, s in zip(x[image], size[image], strict=True)}
        alone = [
            came[tuple(row.tolist())] == s
            for row, s in zip(out.x[image], out.size[image], strict=True)
            if tuple(row.tolist()) in came
        ]
        assert all(alone)
        assert len(alone) >= prefix + patches - 2 * merged
    # Merged tokens are means: none lies outside the range of what came.
    assert (out.x.amax(1) <= x.amax(1) + 1e-5).all()
    assert (out.x.amin(1) >= x.amin(1) - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_patches_stay_what_they_are(method: str, dtype: torch.dtype) -> None:
    row = torch.randn(24).to(dtype)
    x = torch.cat([torch.randn(1, 1, 24).to(dtype), row.expand(1, 10, 24)], dim=1)
    same = torch.randn(1, 3, 1, 8).to(dtype).expand(1, 3, 11, 8)
    out = reducer_of(method, 1, 10, 5)(Tokens(x), Attended(same, same, same), 0.5)
    assert out.x.dtype == out.size.dtype == dtype
    torch.testing.assert_close(out.x[:, 1:], row.expand(1, 5, 24))
    assert out.size.sum() == 11


@pytest.mark.parametrize("variant", ["vit", "registers", "pooled"])
def test_the_macs_are_what_runs(method: str, variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant], **LARGE)
    vit.use_fused_attention(False)
    pruner = load_method(method)
    sites = pruner.sites(vit.shape())
    pruner.cut(vit, {}, dict(zip(sites, (0.3, 0.0, 0.45), strict=True)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, 2))
    assert counter.get_total_flops() == 2 * 2 * cost_of(vit.shape()).macs


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_nothing_is_the_model_itself(method: str, variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    images = images_for(vit)
    expected = vit(images)
    load_method(method).cut(vit, {}, {SITE: 0.01, "blocks.2.token": 0.0})
    assert torch.equal(vit(images), expected)


def test_lengths_fall_by_the_share_and_at_most_by_half(method: str, tiny) -> None:
    shape = tiny(**LARGE).shape()
    thresholds = {"blocks.0.token": 0.25, "blocks.1.token": 0.9, "blocks.2.token": 0.3}
    shrunk = load_method(method).shrink(shape, thresholds)
    assert [block.mlp_tokens for block in shrunk.blocks] == [1 + 18, 1 + 9, 1 + 6]


def test_allocation_merges_the_same_number_everywhere(method: str, tiny) -> None:
    shape = tiny(depth=6, img_size=(80, 80)).shape()
    pruner = load_method(method)
    shrunk = pruner.shrink(shape, pruner.allocate(shape, {}, 0.8 * cost_of(shape).macs))
    counts = [100, *(block.mlp_tokens - 1 for block in shrunk.blocks)]
    steps = [before - after for before, after in itertools.pairwise(counts)]
    assert max(steps) - min(steps) <= 1
    assert 0.77 < cost_of(shrunk).macs / cost_of(shape).macs <= 0.8


def test_duplicated_patches_merge_without_a_trace(method: str, tiny) -> None:
    """Pairs of equal patches become one each: later blocks see the same through sizes."""
    vit = tiny(depth=2, pos_embed="none", **LARGE)
    images = images_for(vit)
    pairs = images.unflatten(3, (2, 16))  # patches are 8 wide: columns of four
    images = pairs[..., :8].repeat(1, 1, 1, 1, 2).flatten(3)  # each patch twice, side by side
    with torch.no_grad():
        expected = vit(images)
        pruner = load_method(
            method, **({"tau_info": 0.0, "tau_size": 0.0} if method == "mctf" else {})
        )
        pruner.cut(vit, {}, {SITE: 0.5})
        assert vit.shape().blocks[1].tokens == 1 + 12
        torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=0)


def test_gradients_reach_every_patch(method: str, tiny) -> None:
    vit = tiny(**LARGE)
    load_method(method).cut(vit, {}, {SITE: 0.4, "blocks.1.token": 0.3})
    images = images_for(vit).requires_grad_(True)
    vit(images).square().sum().backward()
    assert (images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)) > 0).all()


def test_a_model_in_bfloat16_runs_and_nearly_agrees(method: str) -> None:
    vit = build_tiny(**LARGE)
    load_method(method).cut(vit, {}, {"blocks.1.token": 0.3})
    images = images_for(vit)
    expected, half = vit(images), vit.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    # Near ties may be decided otherwise; the logits spread by 1 to 3.
    assert (half.float() - expected).abs().max() < 0.3 * expected.std()


@pytest.mark.slow
def test_it_compiles_whole(method: str, tiny) -> None:
    """One graph: no branch depends on a value, and no number of tokens on an image."""
    vit = tiny(**LARGE)
    load_method(method).cut(vit, {}, {SITE: 0.3, "blocks.1.token": 0.5})
    images = images_for(vit)
    whole = torch.compile(vit, backend="eager", fullgraph=True)
    assert torch.equal(whole(images), vit(images))


def test_a_plan_with_merging_survives_saving(method: str, tiny, tmp_path) -> None:
    vit = tiny(**LARGE)
    options = {"pitome": {"margin": 0.4}, "mctf": {"tau_info": 0.5}}.get(method, {})
    step = Step(pruner=load_method(method, **options), thresholds={"blocks.1.token": 0.4})
    Plan(steps=(step,)).apply(vit)
    vit.save(tmp_path)
    again, images = PrunableViT.load(tmp_path).eval(), images_for(vit)
    assert torch.equal(again(images), vit(images))
    assert again.token_step == vit.token_step
    assert again.token_step["options"] == load_method(method, **options).options()
