from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruners import Plan
from search.space.budget import CLOSE, TOLERANCE, meet_budget

COARSE, FINE = ("a", "coarse"), ("a", "fine")


def planner(steps: dict, seen: list | None = None):
    """Costs 1 less a share per group, in whole steps of that group."""

    def plan_at(positions):
        if seen is not None:
            seen.append(dict(positions))
        cut = sum(int(place * steps[group]) / steps[group] for group, place in positions.items())
        return Plan(), 1.0 - cut / len(positions)

    return plan_at


@given(st.floats(0.25, 0.95))
def test_fine_groups_make_up_for_coarse_ones(budget: float) -> None:
    found = meet_budget([COARSE, FINE], planner({COARSE: 5, FINE: 4000}), budget, 0.05, 0.95)
    assert len(found) == 1
    assert found[0][1] == pytest.approx(budget, rel=TOLERANCE)


@given(st.floats(0.15, 0.95))
def test_without_fine_ones_both_sides_of_the_budget_are_found(budget: float) -> None:
    found = meet_budget([COARSE], planner({COARSE: 7}), budget, 0.05, 0.95)
    ratios = [ratio for _, ratio in found]
    if any(abs(ratio - budget) <= TOLERANCE * budget for ratio in ratios):
        return
    assert min(ratios) <= budget <= max(ratios)
    assert max(ratios) - min(ratios) == pytest.approx(1 / 7)


def test_what_was_sampled_stays_if_it_is_close_and_is_met_closely_if_not() -> None:
    seen: list = []
    plan_at = planner({COARSE: 1000, FINE: 100_000}, seen)
    (found,) = meet_budget([COARSE, FINE], plan_at, 0.5 * (1 + 0.9 * TOLERANCE), 0.1, 0.9)
    assert found[1] == 0.5
    assert seen == [{COARSE: 0.5, FINE: 0.5}]
    (found,) = meet_budget([COARSE, FINE], plan_at, 0.5 * (1 + 2 * TOLERANCE), 0.1, 0.9)
    assert found[1] == pytest.approx(0.51, rel=1.01 * CLOSE)


def test_only_the_last_group_is_turned_alone_if_it_is_enough() -> None:
    seen: list = []
    meet_budget([COARSE, FINE], planner({COARSE: 5, FINE: 4000}, seen), 0.45, 0.05, 0.95)
    apart = [p for p in seen if p[COARSE] != p[FINE]]
    assert apart
    assert len({p[COARSE] for p in apart}) == 1


def test_a_cost_outside_of_the_range_is_never_met() -> None:
    found = meet_budget([FINE], planner({FINE: 10}), 0.3, 0.3001, 0.9)
    assert not any(0.3001 <= ratio <= 0.9 for _, ratio in found) or len(found) == 2
