from __future__ import annotations

import itertools

import pytest
import torch

from pruners import Plan, Step, cost_of, load_method
from pruners.model.masks import keep_n_of_m

METHODS = ["magnitude", "taylor", "fisher", "obd", "woodfisher", "mfac", "cap", "fast_cap"]


def groups_of(weight: torch.Tensor, m: int) -> torch.Tensor:
    return (weight != 0).unflatten(1, (-1, m)).sum(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_are_exact_in_every_group_of_every_layer(
    method: str, pattern: str, n: int, m: int, tiny, batches
) -> None:
    vit = tiny()
    pruner = load_method(method, pattern=pattern)
    shares = dict.fromkeys(pruner.sites(vit.shape()), 0.5)
    Plan(steps=(Step(pruner=pruner, thresholds=shares),)).apply(vit, batches)
    for site, layer in vit.linears():  # the fused qkv is one of them
        assert (groups_of(layer.weight, m) == n).all(), site


def test_a_pattern_keeps_the_highest_of_each_group() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0, 5.0, 5.0, 5.0, 5.0], [0, 0, 7.0, 1.0, 4, 3, 2, 1]])
    expected = [[1, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    assert keep_n_of_m(scores, 2, 4).int().tolist() == expected
    assert keep_n_of_m(scores, 4, 8).int().tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 1, 0, 1, 1, 1, 0],
    ]


def test_a_layer_joins_the_pattern_from_half_of_its_share_on(tiny) -> None:
    shape = tiny().shape()
    pruner = load_method("magnitude", pattern="2:4")
    site = "blocks.0.mlp.fc1"
    assert pruner.shrink(shape, {site: 0.24}).nonzero == {}
    assert pruner.shrink(shape, {site: 0.25}).nonzero == {site: 24 * 96 // 2}
    assert pruner.shrink(shape, {site: 0.9}).nonzero == {site: 24 * 96 // 2}


def test_a_width_that_the_pattern_does_not_divide_is_refused(tiny) -> None:
    shape = tiny(embed_dim=30).shape()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv has 30 inputs; the pattern 2:4"):
        load_method("magnitude", pattern="2:4").shrink(shape, {"blocks.0.attn.qkv": 0.5})


def test_patterns_are_allocated_layer_by_layer(tiny) -> None:
    vit = tiny()
    with torch.no_grad():
        dict(vit.linears())["blocks.1.mlp.fc2"].weight.mul_(0.01)
    pruner = load_method("magnitude", pattern="2:4")
    dense = cost_of(vit.shape()).effective_macs
    shares = pruner.allocate(vit.shape(), pruner.score(vit, []), 0.9 * dense)
    assert set(shares.values()) == {0.0, 0.5}
    assert shares["blocks.1.mlp.fc2"] == 0.5
    assert cost_of(pruner.shrink(vit.shape(), shares)).effective_macs <= 0.9 * dense


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"pattern of cap is '1:4'; give one of \['none', '2:4', '4:8'\]"
    ):
        load_method("cap", pattern="1:4")
    for option, value, least in (("rounds", 0, 1), ("ramp_epochs", -1, 0)):
        right = f"option {option} of taylor is {value}; give a whole number, at least {least}"
        with pytest.raises(ValueError, match=right):
            load_method("taylor", **{option: value})


def test_rounds_score_anew_before_each_sub_step(tiny, batches) -> None:
    vit, once = tiny(), tiny()
    site, calls = "blocks.1.mlp.fc1", []

    pruner = load_method("taylor", rounds=4)
    object.__setattr__(
        pruner,
        "score",
        lambda v, b: calls.append(v.shape().nonzero.get(site)) or type(pruner).score(pruner, v, b),
    )
    Plan(steps=(Step(pruner=pruner, thresholds={site: 0.8}),)).apply(vit, batches)
    weights = 24 * 96
    assert calls == [None, *(weights - int(0.2 * k * weights + 0.5) for k in (1, 2, 3))]
    Plan(steps=(Step(pruner=load_method("taylor"), thresholds={site: 0.8}),)).apply(once, batches)
    assert vit.shape() == once.shape()
    assert not torch.equal(vit.masks[site], once.masks[site])


def test_a_ramp_reaches_its_shares_cubically_and_monotonically(tiny, batches) -> None:
    vit, site = tiny(), "blocks.2.mlp.fc1"
    pruner = load_method("magnitude", ramp_epochs=3)
    plan = Plan(steps=(Step(pruner=pruner, thresholds={site: 0.8}),))
    assert pruner.ramped({site: 0.8}, 0)[site] == pytest.approx(0.8 * (1 - 0.75**3))
    assert pruner.ramped({site: 0.8}, 3)[site] == pruner.ramped({site: 0.8}, 9)[site] == 0.8
    plan.apply(vit, batches)
    zeros, masks = [int((~vit.masks[site]).sum())], [vit.masks[site]]
    for epoch in (1, 2, 3, 4):
        plan.ramp(vit, batches, epoch)
        zeros.append(int((~vit.masks[site]).sum()))
        masks.append(vit.masks[site])
    weights = 24 * 96
    expected = [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0, 1.0]
    assert zeros == [weights - (weights - int(0.8 * e * weights + 0.5)) for e in expected]
    for before, after in itertools.pairwise(masks):
        assert not (after & ~before).any()  # nothing comes back
    assert vit.shape() == plan.shape(tiny().shape())


def test_other_families_do_not_ramp(tiny, batches) -> None:
    vit = tiny()
    plan = Plan(
        steps=(Step(pruner=load_method("grouped"), thresholds={"blocks.0.mlp.neuron": 0.5}),)
    )
    plan.apply(vit, batches)
    shape = vit.shape()
    plan.ramp(vit, batches, 1)
    assert vit.shape() == shape


@pytest.mark.parametrize("criterion", METHODS)
def test_every_weight_method_scores_units_through_grouped(criterion: str, tiny, batches) -> None:
    vit = tiny()
    weights = load_method(criterion).score(vit, batches)
    scores = load_method("grouped", criterion=criterion).score(vit, batches)
    fc1, fc2 = weights["blocks.1.mlp.fc1"], weights["blocks.1.mlp.fc2"]
    torch.testing.assert_close(scores["blocks.1.mlp.neuron"], fc1.sum(1) + fc2.sum(0))
