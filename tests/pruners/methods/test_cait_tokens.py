from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.methods.cait_tokens import MergeNeighbours, feature_map
from pruners.model.tokens import Tokens
from pruners.training.learner import LearningData
from tests.models import VARIANTS, images_for

LARGE = {"img_size": (48, 32), "depth": 4}  # 6 rows of 4 patches


def merger(
    vit: PrunableViT, grid: tuple[int, int], axis: int, merged: int, merge: str = "linear"
) -> MergeNeighbours:
    return MergeNeighbours(vit.shape(), grid, axis, merged, merge)


def as_tokens(grid: Tensor, prefix: int = 1) -> Tokens:
    """[B, H, W, D] behind some prefix tokens."""
    return Tokens(
        torch.cat([torch.randn(len(grid), prefix, grid.shape[-1]), grid.flatten(1, 2)], 1)
    )


@pytest.mark.parametrize("merge", ["linear", "mean"])
def test_columns_then_rows_are_a_two_by_two_average_pool(merge: str, tiny) -> None:
    vit = tiny()
    grid = torch.randn(2, 6, 4, 24)
    tokens = as_tokens(grid)
    columns = merger(vit, (6, 4), axis=1, merged=2, merge=merge)(tokens)
    rows = merger(vit, (6, 2), axis=0, merged=3, merge=merge)(columns)
    image = grid.permute(0, 3, 1, 2)
    for x, kernel, shape in ((columns.x, (1, 2), (6, 2)), (rows.x, (2, 2), (3, 2))):
        pooled = x[:, 1:].transpose(1, 2).unflatten(2, shape)
        torch.testing.assert_close(pooled, F.avg_pool2d(image, kernel), atol=1e-6, rtol=0)
        assert torch.equal(x[:, 0], tokens.x[:, 0])  # the class token is untouched


def test_a_ramp_shows_which_axis_is_merged(tiny) -> None:
    vit = tiny()
    ramp = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 6, 4, 24)  # value = column
    columns = merger(vit, (6, 4), axis=1, merged=2)(as_tokens(ramp)).x[:, 1:, 0]
    assert columns.view(6, 2)[0].tolist() == [0.5, 2.5]
    rows = merger(vit, (6, 4), axis=0, merged=3)(as_tokens(ramp)).x[:, 1:, 0]
    assert rows.view(3, 4).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3


@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 9),
    data=st.data(),
    merge=st.sampled_from(["linear", "mean", "weighted"]),
)
@settings(max_examples=40, deadline=None)
def test_any_number_of_disjoint_pairs(rows: int, columns: int, data, merge: str) -> None:
    merged = data.draw(st.integers(1, columns // 2))
    torch.manual_seed(0)
    vit = PrunableViT(
        VisionTransformer(img_size=8, patch_size=8, embed_dim=4, depth=1, num_heads=1)
    )
    module = merger(vit, (rows, columns), axis=1, merged=merged, merge=merge)
    grid = torch.randn(2, rows, columns, 4)
    out = module(as_tokens(grid)).x[:, 1:].unflatten(1, (rows, columns - merged))
    counts = torch.bincount(module.owner, minlength=columns - merged)
    assert counts.sum() == columns
    assert int((counts == 2).sum()) == merged  # pairs; all others stand alone
    assert int(counts.max()) == 2
    assert (module.owner.diff() >= 0).all()  # neighbours, in order
    for place in range(columns - merged):
        members = grid[:, :, module.owner == place]
        if merge == "weighted":
            low, high = members.amin(2) - 1e-5, members.amax(2) + 1e-5
            assert ((out[:, :, place] >= low) & (out[:, :, place] <= high)).all()
        else:
            torch.testing.assert_close(out[:, :, place], members.mean(2), atol=1e-6, rtol=0)
    # Merging what was expanded again gives the merged grid; a constant grid does not change.
    again = module.expand(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    merged_again = module(as_tokens(again)).x[:, 1:].unflatten(1, (rows, columns - merged))
    torch.testing.assert_close(merged_again, out, atol=1e-6, rtol=0)
    constant = module(as_tokens(torch.full((1, rows, columns, 4), 3.0))).x[:, 1:]
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))


def test_weighted_merging_favours_who_agrees_with_the_neighbourhood(tiny) -> None:
    vit = tiny()
    grid = torch.ones(1, 3, 4, 24)
    grid[0, 1, 1] = -1.0  # disagrees with everything around it
    out = merger(vit, (3, 4), 1, 2, "weighted")(as_tokens(grid)).x[:, 1:].unflatten(1, (3, 2))
    weight = (out[0, 1, 0, 0] + 1) / 2  # of the first of the pair (1, -1)
    near = F.avg_pool2d(grid.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
    cosines = F.cosine_similarity(grid.permute(0, 3, 1, 2), near, dim=1)[0, 1, :2]
    torch.testing.assert_close(weight, cosines.softmax(0)[0])
    assert weight > 0.7


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_alternate_columns_and_rows(variant: str, tiny) -> None:
    vit = tiny(**{**LARGE, **VARIANTS[variant]})
    prefix = vit.shape().prefix_tokens
    method = load_method("cait_tokens")
    thresholds = {"blocks.1.token": 0.5, "blocks.2.token": 0.5, "blocks.3.token": 0.5}
    predicted = method.shrink(vit.shape(), thresholds)
    method.cut(vit, {}, thresholds)
    assert vit.shape() == predicted
    assert [b.tokens - prefix for b in predicted.blocks] == [24, 12, 6, 3]
    assert [vit.blocks[i].front.axis for i in (1, 2, 3)] == [1, 0, 1]
    images = images_for(vit)
    full = feature_map(vit, images)
    assert full.shape == (len(images), 24, 6, 4)
    assert torch.equal(full[:, :, 0], full[:, :, 1])  # rows 0 and 1 are one
    assert torch.equal(full[:, :, :, 0], full[:, :, :, 3])  # the columns were merged twice


def test_an_axis_of_length_one_leaves_the_other(tiny) -> None:
    vit = tiny(img_size=(8, 64), depth=4)
    load_method("cait_tokens").cut(vit, {}, {f"blocks.{i}.token": 0.5 for i in (1, 2, 3)})
    assert [block.tokens for block in vit.shape().blocks] == [9, 5, 3, 2]
    assert vit(images_for(vit)).shape == (3, 5)


def test_deit_small_at_224(tiny) -> None:
    """The table of section 2 without the merges' own cost, which is counted on top."""
    for width, heads, gmacs in ((192, 3, 1.25), (384, 6, 4.60), (768, 12, 17.56)):
        with torch.device("meta"):
            shape = PrunableViT(VisionTransformer(embed_dim=width, num_heads=heads)).shape()
        method = load_method("cait_tokens", merge="mean")
        assert cost_of(shape).gmacs == pytest.approx(gmacs, rel=0.01)
        for places, ratio in (((6, 9), 3.15), ((4, 8), 2.66), ((3, 9), 2.56), ((3, 6), 2.28)):
            thresholds = {f"blocks.{i}.token": 0.5 for i in places}
            shrunk = method.shrink(shape, thresholds)
            tokens = [block.tokens for block in shrunk.blocks]
            assert tokens == [197] * places[0] + [99] * (places[1] - places[0]) + [50] * (
                12 - places[1]
            )
            if width == 384:
                assert cost_of(shrunk).gmacs == pytest.approx(ratio, rel=0.01)
            linear = load_method("cait_tokens").shrink(shape, thresholds)
            extra = 98 * 2 * width**2 + 49 * 2 * width**2
            assert cost_of(linear).macs - cost_of(shrunk).macs == extra
            assert cost_of(linear).params - cost_of(shape).params == 2 * (2 * width**2 + width)


def test_macs_equal_the_profilers(tiny) -> None:
    vit = tiny(**LARGE)
    vit.use_fused_attention(False)
    load_method("cait_tokens").cut(vit, {}, {"blocks.1.token": 0.25, "blocks.3.token": 0.5})
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        vit(images_for(vit, 1))
    assert counter.get_total_flops() == 2 * cost_of(vit.shape()).macs


def test_the_linear_merge_starts_as_the_mean_and_learns(tiny) -> None:
    vit = tiny(**LARGE)
    other = copy.deepcopy(vit)
    thresholds = {"blocks.1.token": 0.5, "blocks.2.token": 0.5}
    load_method("cait_tokens").cut(vit, {}, thresholds)
    load_method("cait_tokens", merge="mean").cut(other, {}, thresholds)
    images = images_for(vit)
    torch.testing.assert_close(vit(images), other(images), atol=1e-5, rtol=0)
    vit(images).square().sum().backward()
    assert vit.blocks[1].front.mix.weight.grad.abs().sum() > 0


def test_allocation_halves_as_late_as_the_budget_allows(tiny) -> None:
    shape = tiny(depth=12, img_size=(64, 64)).shape()
    method, dense = load_method("cait_tokens"), cost_of(shape).macs
    reached = []
    for budget in (0.9, 0.7, 0.5, 0.3):
        thresholds = method.allocate(shape, {}, budget * dense)
        halved = [site for site, share in thresholds.items() if share > 0]
        assert set(thresholds.values()) <= {0.0, 0.5}
        assert 1 <= len(halved) <= 4
        reached.append(cost_of(method.shrink(shape, thresholds)).macs / dense)
        assert budget - 0.06 < reached[-1] <= budget
    with pytest.raises(ValueError, match="out of reach"):
        method.allocate(shape, {}, 0.01 * dense)


def test_other_images_and_reduced_models_are_refused_by_name(tiny) -> None:
    vit = tiny(**LARGE, dynamic_img_size=True)
    load_method("cait_tokens").cut(vit, {}, {"blocks.1.token": 0.5})
    with pytest.raises(ValueError, match="cait_tokens got 12 patches; give images of 6 x 4"):
        vit(torch.randn(1, 3, 32, 24))
    reduced = tiny(**LARGE)
    load_method("evit").cut(reduced, {}, {"blocks.1.token": 0.5})
    with pytest.raises(ValueError, match="cait_tokens got a model with reduced tokens"):
        load_method("cait_tokens").cut(reduced, {}, {"blocks.2.token": 0.5})
    with pytest.raises(ValueError, match="option merge of cait_tokens is 'max'; give one of"):
        load_method("cait_tokens", merge="max")


def test_a_plan_with_merging_survives_saving(tiny, tmp_path) -> None:
    vit = tiny(**LARGE)
    step = Step(pruner=load_method("cait_tokens"), thresholds={"blocks.2.token": 0.3})
    Plan(steps=(step,)).apply(vit)
    with torch.no_grad():
        vit.blocks[2].front.mix.weight.add_(0.1 * torch.randn_like(vit.blocks[2].front.mix.weight))
    vit.save(tmp_path)
    again, images = PrunableViT.load(tmp_path).eval(), images_for(vit)
    assert torch.equal(again(images), vit(images))
    assert again.shape() == vit.shape()


def test_cait_is_two_steps_of_one_plan(tiny, batches, tmp_path) -> None:
    vit = tiny(**LARGE)
    batches = [(torch.randn(6, 3, 48, 32), labels) for _, labels in batches]
    channels = load_method("cait_channels", epochs=1, budget=0.8, least_dims=2)
    learned = channels.learn(vit, LearningData.of(batches))
    dense = cost_of(vit.shape()).macs
    own = channels.allocate(vit.shape(), learned.scores, 0.8 * dense)
    tokens = load_method("cait_tokens")
    left = channels.shrink(vit.shape(), own)
    plan = Plan(
        steps=(
            Step(pruner=channels, thresholds=own),
            Step(pruner=tokens, thresholds=tokens.allocate(left, {}, 0.5 * dense)),
        )
    )
    predicted = plan.shape(vit.shape())
    plan.apply(vit, batches, learned)
    assert vit.shape() == predicted
    assert 0.4 * dense < cost_of(predicted).macs <= 0.5 * dense
    assert predicted.blocks[1].hidden < 96
    assert predicted.blocks[-1].tokens < 25
    vit.save(tmp_path)
    images = images_for(vit)
    assert torch.equal(PrunableViT.load(tmp_path).eval()(images), vit.eval()(images))
