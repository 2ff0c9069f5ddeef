from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from tests.models import TINY


def test_the_smallest_weights_of_each_layer_go(tiny) -> None:
    vit = tiny()
    site, share = "blocks.1.mlp.fc1", 0.37
    before = dict(vit.linears())[site].weight.detach().clone()
    Plan(steps=(Step(pruner=load_method("magnitude"), thresholds={site: share}),)).apply(vit)
    after = dict(vit.linears())[site].weight.detach()
    gone = after == 0
    assert int(gone.sum()) == int(share * before.numel() + 0.5)
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone])


def test_other_layers_are_untouched(tiny) -> None:
    vit = tiny()
    before = {site: layer.weight.detach().clone() for site, layer in vit.linears()}
    Plan(
        steps=(Step(pruner=load_method("magnitude"), thresholds={"blocks.0.attn.qkv": 0.5}),)
    ).apply(vit)
    changed = [site for site, layer in vit.linears() if not torch.equal(layer.weight, before[site])]
    assert changed == ["blocks.0.attn.qkv"]


def test_global_scope_ranks_all_layers_together(tiny) -> None:
    vit = tiny()
    with torch.no_grad():
        dict(vit.linears())["blocks.0.mlp.fc1"].weight.mul_(10)
        dict(vit.linears())["blocks.2.mlp.fc2"].weight.mul_(0.4)
    shape, scores = vit.shape(), load_method("magnitude").score(vit, [])
    budget = 0.6 * cost_of(shape).macs
    thresholds = load_method("magnitude", scope="global").allocate(shape, scores, budget)
    # All layers run on the same tokens, so ranking per MAC is ranking by magnitude.
    kept_least = min(
        s.flatten().sort().values[int(thresholds[k] * s.numel() + 0.5)] for k, s in scores.items()
    )
    cut_most = max(
        s.flatten().sort().values[int(thresholds[k] * s.numel() + 0.5) - 1]
        for k, s in scores.items()
        if thresholds[k] > 0
    )
    assert cut_most <= kept_least
    assert thresholds["blocks.0.mlp.fc1"] < 0.2 < 0.8 < thresholds["blocks.2.mlp.fc2"]


def test_layer_scope_gives_every_layer_the_same_share(tiny) -> None:
    vit = tiny()
    shape, magnitude = vit.shape(), load_method("magnitude", scope="layer")
    thresholds = magnitude.allocate(shape, magnitude.score(vit, []), 0.6 * cost_of(shape).macs)
    assert set(thresholds) == set(magnitude.sites(shape))
    assert len(set(thresholds.values())) == 1


def test_masking_again_keeps_what_was_masked(tiny) -> None:
    vit = tiny()
    magnitude, site = load_method("magnitude"), "blocks.0.mlp.fc2"
    magnitude.cut(vit, magnitude.score(vit, []), {site: 0.3})
    first = vit.masks[site].clone()
    scores = {s: torch.rand_like(v) for s, v in magnitude.score(vit, []).items()}
    magnitude.cut(vit, scores, {site: 0.6})
    assert not (vit.masks[site] & ~first).any()
    assert vit.shape().nonzero[site] == first.numel() - int(0.6 * first.numel() + 0.5)


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.floats(0.0, 0.99), min_size=12, max_size=12))
def test_predicted_nonzeros_are_measured_nonzeros(shares: list[float]) -> None:
    vit = PrunableViT.from_state_dict(_STATE, **TINY)
    magnitude = load_method("magnitude")
    thresholds = dict(zip(magnitude.sites(vit.shape()), shares, strict=True))
    predicted = cost_of(magnitude.shrink(vit.shape(), thresholds)).nonzeros
    magnitude.cut(vit, magnitude.score(vit, []), thresholds)
    zeros = sum(int((layer.weight == 0).sum()) for _, layer in vit.linears())
    assert predicted == cost_of(vit.shape()).params - zeros


def test_options_are_checked() -> None:
    with pytest.raises(
        ValueError, match="scope of magnitude is 'layers'; give 'global' or 'layer'"
    ):
        load_method("magnitude", scope="layers")


def _trained_like_state() -> dict[str, torch.Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    generator = torch.Generator().manual_seed(0)
    state = VisionTransformer(**TINY).state_dict()
    return {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}


_STATE = _trained_like_state()
