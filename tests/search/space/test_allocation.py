from __future__ import annotations

import numpy as np
import pytest
import torch

from pruners import cost_of, load_method
from search.space.allocation import GRID, own_allocation, unscored_allocation


@pytest.fixture
def dense(tiny):
    return tiny(patch_size=4)


def test_at_budgets_that_were_asked_it_is_the_methods_own_allocation(dense, batches) -> None:
    shape, macs = dense.shape(), cost_of(dense.shape()).effective_macs
    for name in ("magnitude", "grouped", "tome"):
        method = load_method(name)
        scores = method.score(dense, batches)
        own = own_allocation(method, shape, scores, max_share=0.9999)
        for budget in own.budgets[(own.budgets > 0.0) & (own.budgets < 1.0)]:
            expected = method.allocate(shape, scores, budget * macs)
            assert own.at(budget) == pytest.approx({s: expected.get(s, 0.0) for s in own.shares})


def test_between_them_it_is_in_between_and_ends_at_everything(dense) -> None:
    method, shape = load_method("tome"), dense.shape()
    own = own_allocation(method, shape, {}, max_share=0.8)
    assert own.budgets[0] == 0.0
    assert np.allclose(np.diff(own.budgets[1:]), GRID)
    for site, grid in own.shares.items():
        assert grid[0] == grid.max()
        assert own.at(0.0)[site] == 0.8
        assert own.at(1.0)[site] == own.at(1.5)[site] == 0.0
        middle = (own.budgets[4] + own.budgets[5]) / 2
        assert own.at(middle)[site] == pytest.approx((grid[4] + grid[5]) / 2)


def test_shares_stay_below_the_largest_but_for_what_goes_whole(tiny) -> None:
    shape, method = tiny(patch_size=4).shape(), load_method("wdpruning")
    scores = {s: torch.linspace(-1.0, 1.0, n) for s, n in method.sites(shape).items()}
    own = own_allocation(method, shape, scores, max_share=0.5)
    for site, grid in own.shares.items():
        assert all(share <= 0.5 or share == 1.0 for share in grid), site
        assert grid[0] >= 0.5 or site.endswith(".block")
    assert any(1.0 in grid for grid in own.shares.values())


def test_of_what_is_not_known_only_the_reach_is_said(tiny) -> None:
    shape = tiny().shape()
    own = unscored_allocation(load_method("grouped"), shape, 0.9)
    assert set(own.at(0.0).values()) == {0.9}
    assert own.at(0.25) == pytest.approx(dict.fromkeys(own.shares, 0.675))
