from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners import load_method, method_names
from tests import contract
from tests.models import VARIANTS


@pytest.fixture(params=[*method_names(), "grouped width"])
def pruner(request: pytest.FixtureRequest):
    if request.param == "grouped width":
        return load_method("grouped", units=("head", "neuron", "width"))
    return load_method(request.param)


def test_options(pruner) -> None:
    contract.is_frozen_dataclass_of_json_options(pruner)


def test_scores(pruner, tiny, batches) -> None:
    vit = tiny()
    contract.scoring_leaves_the_model_as_it_was(pruner, vit.train(), batches)
    contract.scores_are_finite_and_cover_every_site(pruner, vit.eval(), batches)
    contract.scoring_is_deterministic(pruner, vit, batches)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if i else ()) for i, v in enumerate(VARIANTS)],
)
def test_cut(pruner, variant: str, tiny, batches) -> None:
    vit = tiny(**VARIANTS[variant])
    if vit.shape().channels == 1:
        batches = [(images[:, :1], labels) for images, labels in batches]
    with torch.no_grad():
        contract.larger_shares_never_cost_more(pruner, vit)
    contract.unknown_sites_and_shares_out_of_range_are_refused(pruner, vit)
    contract.threshold_zero_changes_nothing(pruner, vit, batches)
    contract.cut_gives_the_predicted_shape(pruner, vit, batches)


def test_allocation(pruner, tiny, batches) -> None:
    contract.allocation_meets_its_budget(pruner, tiny(), batches)


def test_saving(pruner, tiny, batches, tmp_path) -> None:
    contract.survives_saving(pruner, tiny(), batches, tmp_path / "model")


def test_training_goes_on(pruner, tiny, batches) -> None:
    contract.gradients_flow_after_the_cut(pruner, tiny(), batches)


@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("taylor", {}, 2.0),
        ("obd", {"hessian": "hutchinson"}, 2.0),
        ("obd", {"hessian": "gauss_newton"}, 4.0),  # squared gradients of drawn labels
        ("fisher", {}, 4.0),
        ("woodfisher", {}, 4.0),
        ("mfac", {}, 4.0),
        ("cap", {}, 4.0),
        ("fast_cap", {}, 4.0),
    ],
)
def test_doubling_the_loss(method, options, factor, tiny, batches, monkeypatch) -> None:
    """Gradients and Hessians double, Fisher matrices quadruple."""
    vit, pruner = tiny(), load_method(method, **options)
    single = pruner.score(vit, batches)
    loss = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **more: 2.0 * loss(*args, **more))
    double = pruner.score(vit, batches)
    for site, score in single.items():
        torch.testing.assert_close(double[site], factor * score, rtol=2e-2, atol=1e-12)
