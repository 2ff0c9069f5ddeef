from __future__ import annotations

import math

import numpy as np
import pytest
from epsilon_net import net_positions, ranks, within_net
from hypothesis import given, settings
from hypothesis import strategies as st

from search.strategy.rungs import Floats
from tests.rungs import (
    ETAS,
    FIRST,
    RUNGS,
    check_first_arrivals,
    check_order_of_arrival,
    check_plain_halving,
)


def peeled(costs: Floats, top1s: Floats) -> list[int]:
    """Non-domination ranks by definition, front by front."""
    rank, left, level = [-1] * len(costs), set(range(len(costs))), 0
    while left:
        gone = {
            i
            for i in left
            if not any(
                costs[j] <= costs[i]
                and top1s[j] >= top1s[i]
                and (costs[j] < costs[i] or top1s[j] > top1s[i])
                for j in left
            )
        }
        for i in gone:
            rank[i] = level
        left, level = left - gone, level + 1
    return rank


def test_rank_is_not_sort_order() -> None:
    # Unsorted, and no permutation that is its own inverse.
    costs, top1s = np.array([0.2, 0.3, 0.1, 0.4]), np.array([70.0, 60.0, 75.0, 80.0])
    assert ranks(costs, top1s).tolist() == [1, 2, 0, 0]


def test_no_points_have_no_ranks() -> None:
    assert ranks([], []).tolist() == []


@settings(max_examples=60, deadline=None)
@given(RUNGS)
def test_ranks_are_those_of_fronts_peeled_one_by_one(rung: Floats) -> None:
    costs, top1s = rung
    assert ranks(costs, top1s).tolist() == peeled(costs, top1s)


@settings(max_examples=60, deadline=None)
@given(rung=RUNGS, eta=ETAS, data=st.data())
def test_the_order_of_arrival_does_not_matter(
    rung: Floats, eta: float, data: st.DataObject
) -> None:
    check_order_of_arrival(within_net, rung, eta, data)


@pytest.mark.parametrize(("eta", "passing"), FIRST)
def test_the_first_eta_arrivals_pass(eta: float, passing: int) -> None:
    check_first_arrivals(within_net, eta, passing)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), ETAS)
def test_at_one_cost_it_is_plain_halving(values: list[int], eta: float) -> None:
    check_plain_halving(within_net, values, eta)


def test_net_positions_by_hand() -> None:
    # A front of four, unsorted, of which one is near the best; then a dominated point, twice.
    costs = np.array([0.5, 0.1, 0.9, 0.3, 0.9, 0.88])
    top1s = np.array([75.0, 60.0, 80.0, 71.0, 70.0, 79.5])
    # 0.9/80 first, then the far end 0.1/60, then 0.3/71 or 0.5/75 by distance, 0.88/79.5 last.
    scaled = np.column_stack([(costs - 0.1) / 0.8, (top1s - 60.0) / 20.0])
    to = {i: min(math.dist(scaled[i], scaled[j]) for j in (2, 1)) for i in (0, 3)}
    assert to[3] > to[0]
    assert net_positions(costs, top1s).tolist() == [4, 2, 1, 3, 6, 5]
    twice = np.r_[costs, 0.9], np.r_[top1s, 70.0]
    assert net_positions(*twice).tolist() == [4, 2, 1, 3, 6, 5, 6]


@settings(max_examples=60, deadline=None)
@given(RUNGS)
def test_net_positions_put_better_ranks_first(rung: Floats) -> None:
    costs, top1s = rung
    positions, rank = net_positions(costs, top1s), np.array(peeled(costs, top1s))
    for i in range(len(costs)):
        assert positions[i] > (rank < rank[i]).sum()
        assert positions[i] <= (rank <= rank[i]).sum()
    # Each position is one more than the number of results before, so none is given out twice.
    assert sorted(positions) == sorted(1 + (positions < p).sum() for p in positions)
    best = np.flatnonzero(rank == 0)
    assert positions[best[top1s[best].argmax()]] == 1


def test_the_net_does_not_depend_on_units() -> None:
    costs = np.random.default_rng(7).uniform(0.3, 0.8, 30)
    top1s = 80 - 20 * (1 - costs) ** 3  # one front
    positions = net_positions(costs, top1s).tolist()
    assert sorted(positions) == list(range(1, 31))
    assert net_positions(1_000 * costs, top1s).tolist() == positions
    assert net_positions(costs, 70 + top1s / 100).tolist() == positions
