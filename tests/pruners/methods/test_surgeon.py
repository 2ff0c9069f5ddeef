from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners import cost_of, load_method
from pruners.model.width import channel_slices
from pruners.saliency.kronecker import drawn_labels, kronecker_factors
from pruners.saliency.removal import Removal
from tests.models import VARIANTS


def scored(vit, batches, **options):
    return load_method("surgeon", **options).score(vit, batches)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_unit_has_a_score_for_each(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    shape = vit.shape()
    images = torch.randn(8, shape.channels, 24, 16)
    units = ("head", "qk_dim", "v_dim", "neuron", "width")
    method = load_method("surgeon", units=units)
    scores = method.score(vit, [(images, torch.randint(5, (8,)))])
    assert scores.keys() == method.sites(shape).keys()
    for site, number in method.sites(shape).items():
        wanted = (3, number) if site.endswith("_dim") else (number,)
        assert scores[site].shape == wanted
        assert torch.isfinite(scores[site]).all()
        assert bool((scores[site] > 0.0).all())


def test_the_second_of_twin_neurons_is_dear(tiny, batches) -> None:
    vit, site = tiny(), "blocks.1.mlp.neuron"
    mlp = vit.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight[1], mlp.fc1.bias[1] = mlp.fc1.weight[0], mlp.fc1.bias[0]
        mlp.fc2.weight[:, :2] *= 20.0  # either is worth more than any other
    twins = scored(vit, batches, damping=1e-6)[site]
    taylor = load_method("grouped").score(vit, batches)[site]
    assert bool((taylor[:2] > taylor[2:].max()).all())  # who scores them alone keeps both
    assert twins[:2].argmin() != twins[:2].argmax()
    assert twins[:2].min() < twins.median()
    assert twins[:2].max() > twins[2:].max()


def test_scores_order_neurons_as_their_loss_does_once_the_others_have_adjusted(tiny) -> None:
    vit = tiny(mlp_ratio=1.0).double()
    images = torch.randn(80, 3, 24, 16, dtype=torch.float64)
    draws = [(images, torch.zeros(80, dtype=torch.long))] * 20
    labels = drawn_labels(torch.Generator().manual_seed(0))
    factors = kronecker_factors(vit, draws, {"fc2": vit.blocks[1].mlp.fc2}, labels)["fc2"]
    costs = Removal(vit.blocks[1].mlp.fc2.weight.detach(), factors, 1e-6).costs()
    fc2, caught = vit.blocks[1].mlp.fc2, {}
    fc2.register_forward_hook(lambda module, a, out: caught.update(a=a[0]))
    with torch.no_grad():
        before = vit(images).log_softmax(-1)
        a = caught["a"].flatten(0, 1)
        weight, bias, lost = fc2.weight.clone(), fc2.bias.clone(), []
        for unit in range(24):
            rest = [i for i in range(24) if i != unit]
            inputs = torch.cat([a[:, rest], torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            fit = torch.linalg.lstsq(inputs, a[:, unit]).solution  # the unit from the others
            fc2.weight[:, rest] = weight[:, rest] + torch.outer(weight[:, unit], fit[:-1])
            fc2.weight[:, unit] = 0.0
            fc2.bias.copy_(bias + weight[:, unit] * fit[-1])
            after = vit(images).log_softmax(-1)
            lost.append(F.kl_div(after, before, log_target=True, reduction="batchmean"))
            fc2.weight.copy_(weight)
            fc2.bias.copy_(bias)
    ranks = torch.stack([costs.argsort().argsort(), torch.stack(lost).argsort().argsort()])
    assert torch.corrcoef(ranks.double())[0, 1] > 0.8
    assert 0.25 < costs.sum().item() / torch.stack(lost).sum().item() < 4.0


def test_drawn_labels_need_none_and_are_the_same_for_a_seed(tiny, batches) -> None:
    vit = tiny()
    blind = [(images, torch.zeros_like(labels)) for images, labels in batches]
    first = scored(vit, batches, labels="drawn")
    again = scored(vit, blind, labels="drawn")
    other = scored(vit, batches, labels="drawn", seed=1)
    assert all(torch.equal(first[site], again[site]) for site in first)
    assert any(not torch.equal(first[site], other[site]) for site in first)


def test_a_channel_that_nobody_reads_goes_first(tiny, batches) -> None:
    vit = tiny()
    with torch.no_grad():
        for module, name, axis in channel_slices(vit):
            if axis == 1:
                getattr(module, name)[:, 7] = 0.0
    assert int(scored(vit, batches, units=("width",))["width"].argmin()) == 7


def test_one_order_serves_all_budgets(tiny, batches) -> None:
    vit, method = tiny(), load_method("surgeon")
    shape, scores = vit.shape(), scored(vit, batches)
    kept = None
    for budget in (0.5, 0.7, 0.9):
        shares = method.allocate(shape, scores, budget * cost_of(shape).macs)
        now = {
            (site, unit)
            for site, share in shares.items()
            for unit in scores[site]
            .argsort(descending=True)[: len(scores[site]) - int(share * len(scores[site]) + 0.5)]
            .tolist()
        }
        assert kept is None or kept <= now
        kept = now


def test_a_model_without_curvature_is_refused_by_name(tiny, batches) -> None:
    vit = tiny()
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"^surgeon cannot score blocks\.\d\..*curvature is not finite"
    ):
        scored(vit, batches)
