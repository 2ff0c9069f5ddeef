from __future__ import annotations

import pytest
import torch

from pruners import load_method, method_names
from tests import contract
from tests.conftest import VARIANTS


@pytest.fixture(params=method_names())
def pruner(request: pytest.FixtureRequest):
    return load_method(request.param)


def test_options(pruner) -> None:
    contract.is_frozen_dataclass_of_json_options(pruner)


def test_scores(pruner, tiny, batches) -> None:
    vit = tiny()
    contract.scoring_leaves_the_model_as_it_was(pruner, vit.train(), batches)
    contract.scores_are_finite_and_cover_every_site(pruner, vit.eval(), batches)
    contract.scoring_is_deterministic(pruner, vit, batches)


@pytest.mark.parametrize("variant", VARIANTS)
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
