"""What every pruning method must do; `test_contract.py` runs this over all methods that exist."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor

from pruners import Plan, PrunableViT, Pruner, Step, cost_of, load_method
from tests.models import images_for

Batches = list[tuple[Tensor, Tensor]]


def some_thresholds(pruner: Pruner, vit: PrunableViT) -> dict[str, float]:
    """A different share for every site, so that sites cannot be confused."""
    sites = pruner.sites(vit.shape())
    return {site: 0.15 + 0.5 * index / len(sites) for index, site in enumerate(sites)}


def is_frozen_dataclass_of_json_options(pruner: Pruner) -> None:
    options = json.loads(json.dumps(pruner.options()))
    assert load_method(pruner.name, **options) == pruner
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruner.name_of_nothing = 1  # type: ignore[attr-defined]


def scoring_leaves_the_model_as_it_was(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    before = copy.deepcopy(vit.state_dict())
    mode = vit.training
    pruner.score(vit, batches)
    assert vit.training == mode
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert all(parameter.grad is None for parameter in vit.parameters())


def scores_are_finite_and_cover_every_site(
    pruner: Pruner, vit: PrunableViT, batches: Batches
) -> None:
    scores = pruner.score(vit, batches)
    if pruner.family == "token":
        return
    sites = pruner.sites(vit.shape())
    assert set(scores) == set(sites)
    for site, count in sites.items():
        assert torch.isfinite(scores[site]).all()
        units = scores[site].numel() if pruner.family == "weight" else scores[site].shape[-1]
        assert units == count


def scoring_is_deterministic(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    first, second = pruner.score(vit, batches), pruner.score(vit, batches)
    assert all(torch.equal(first[site], second[site]) for site in first)


def threshold_zero_changes_nothing(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    images = images_for(vit)
    expected, shape = vit(images), vit.shape()
    zeros = dict.fromkeys(pruner.sites(shape), 0.0)
    pruner.cut(vit, pruner.score(vit, batches), zeros)
    assert vit.shape() == shape
    assert torch.equal(vit(images), expected)


def cut_gives_the_predicted_shape(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    thresholds = some_thresholds(pruner, vit)
    predicted = pruner.shrink(vit.shape(), thresholds)
    pruner.cut(vit, pruner.score(vit, batches), thresholds)
    assert vit.shape() == predicted
    assert torch.isfinite(vit(images_for(vit))).all()


def larger_shares_never_cost_more(pruner: Pruner, vit: PrunableViT) -> None:
    shape = vit.shape()
    sites = pruner.sites(shape)
    costs = [
        cost_of(pruner.shrink(shape, dict.fromkeys(sites, share))).effective_macs
        for share in (0.2, 0.35, 0.5, 0.65, 0.8)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < cost_of(shape).effective_macs


def allocation_meets_its_budget(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    shape, scores = vit.shape(), pruner.score(vit, batches)
    dense = cost_of(shape).effective_macs
    for budget in (0.85 * dense, 0.9 * dense):
        thresholds = pruner.allocate(shape, scores, budget)
        reached = cost_of(pruner.shrink(shape, thresholds)).effective_macs
        assert reached <= budget
        # On this tiny model a token or a unit is up to a tenth of the cost.
        assert reached >= budget - 0.12 * dense
    with pytest.raises(ValueError, match="out of reach"):
        pruner.allocate(shape, scores, 0.001 * dense)


def unknown_sites_and_shares_out_of_range_are_refused(pruner: Pruner, vit: PrunableViT) -> None:
    shape = vit.shape()
    site = next(iter(pruner.sites(shape)))
    with pytest.raises(ValueError, match=r"'blocks\.99\.x' names no site"):
        pruner.shrink(shape, {"blocks.99.x": 0.5})
    for share in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"threshold of {site}"):
            pruner.shrink(shape, {site: share})


def survives_saving(pruner: Pruner, vit: PrunableViT, batches: Batches, path) -> None:
    Plan(steps=(Step(pruner=pruner, thresholds=some_thresholds(pruner, vit)),)).apply(vit, batches)
    vit.save(path)
    again = PrunableViT.load(path).eval()
    images = images_for(vit)
    assert again.shape() == vit.shape()
    assert torch.equal(again(images), vit(images))


def gradients_flow_after_the_cut(pruner: Pruner, vit: PrunableViT, batches: Batches) -> None:
    Plan(steps=(Step(pruner=pruner, thresholds=some_thresholds(pruner, vit)),)).apply(vit, batches)
    tokens = vit.train().tokens(images_for(vit))
    (vit.classify(tokens).square().sum() + vit.aux_loss(tokens)).backward()
    for name, parameter in vit.named_parameters():
        if not parameter.requires_grad:  # what a method holds fixed
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
