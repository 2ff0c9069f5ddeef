from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import Plan
from search.space.space import Proposal
from search.strategy.confirm import standard_error, to_confirm, to_train_long
from search.strategy.proposer import Told

# Few different values, so that points coincide, share a cost, or share a gap.
POINTS = st.lists(
    st.tuples(st.integers(1, 8).map(lambda c: c / 8), st.integers(0, 12).map(lambda a: a / 2)),
    max_size=14,
)


def told(points: list[tuple[float, float]]) -> list[Told]:
    """Plans named after their place; a and b are (cost, top-1)."""
    nothing = Proposal(parameters={}, plan=Plan(steps=()), cost_ratio=1.0)
    return [
        Told(name=f"{i:04d}", proposal=nothing, top1=top1, cost=cost)
        for i, (cost, top1) in enumerate(points)
    ]


def names(plans: list[Told]) -> list[str]:
    return [plan.name for plan in plans]


def beats(one: Told, other: Told) -> bool:
    """Whether one is as good in both and better in one, or equal and earlier."""
    if (one.cost, one.top1) == (other.cost, other.top1):
        return one.name < other.name
    return one.cost <= other.cost and one.top1 >= other.top1


def unbeaten(plans: list[Told]) -> list[Told]:
    return [p for p in plans if not any(beats(q, p) for q in plans)]


def gap(plan: Told, plans: list[Told]) -> float:
    """How much better the best plan is that costs no more."""
    return max(q.top1 for q in plans if q.cost <= plan.cost) - plan.top1


@settings(deadline=None)
@given(POINTS, st.sampled_from([0.0, 0.5, 1.0, 2.5]))
def test_members_and_the_nearest_misses_are_confirmed(
    points: list[tuple[float, float]], margin: float
) -> None:
    plans = told(points)
    chosen, members = to_confirm(plans, margin), unbeaten(plans)
    assert set(names(members)) <= set(names(chosen))
    others = [p for p in plans if p not in members]
    near = [p for p in others if gap(p, plans) <= margin]
    missed = [p for p in chosen if p not in members]
    assert all(p in near for p in missed)
    assert len(missed) == min(len(near), len(members))
    left = [gap(p, plans) for p in near if p not in missed]
    assert max((gap(p, plans) for p in missed), default=0.0) <= min(left, default=math.inf)


@settings(deadline=None)
@given(POINTS, st.sampled_from([0.0, 1.0, 6.0]))
def test_those_to_confirm_are_in_order_of_cost_and_each_once(
    points: list[tuple[float, float]], margin: float
) -> None:
    chosen = to_confirm(told(points), margin)
    assert [p.cost for p in chosen] == sorted(p.cost for p in chosen)
    assert len(set(names(chosen))) == len(chosen)


def test_a_near_miss_lies_within_the_margin_below_what_costs_no_more() -> None:
    # 1 lies 0.5 below 0, which is cheaper; 2 would be near 3 but that one is dearer.
    plans = told([(0.4, 70.0), (0.5, 69.5), (0.6, 67.0), (0.8, 75.0), (0.9, 74.0)])
    assert names(to_confirm(plans, 0.4)) == ["0000", "0003"]
    assert names(to_confirm(plans, 0.5)) == ["0000", "0001", "0003"]
    assert names(to_confirm(plans, 1.0)) == ["0000", "0001", "0003", "0004"]
    assert names(to_confirm(plans, 9.0)) == ["0000", "0001", "0003", "0004"]  # 2 members, 2 misses


def test_one_member_takes_the_nearest_miss_alone() -> None:
    plans = told([(0.9, 79.0), (0.8, 79.5), (0.5, 80.0), (0.7, 78.0)])
    assert names(to_confirm(plans, 5.0)) == ["0002", "0001"]


@settings(deadline=None)
@given(POINTS)
def test_unconfirmed_members_are_trained_long(points: list[tuple[float, float]]) -> None:
    plans = told(points)
    chosen = to_train_long(plans, {})
    assert sorted(names(chosen)) == names(unbeaten(plans))
    assert [p.cost for p in chosen] == sorted(p.cost for p in chosen)


@settings(deadline=None)
@given(
    POINTS,
    st.dictionaries(
        st.integers(0, 13), st.lists(st.integers(0, 6).map(float), max_size=3), max_size=14
    ),
)
def test_of_the_confirmed_the_best_means_are_trained_long(
    points: list[tuple[float, float]], seeds: dict[int, list[float]]
) -> None:
    plans = told(points)
    repeats = {f"{i:04d}": top1s for i, top1s in seeds.items()}
    confirmed = {p.name: np.mean(repeats[p.name]) for p in plans if repeats.get(p.name)}
    means = [
        Told(name=p.name, proposal=p.proposal, top1=float(confirmed[p.name]), cost=p.cost)
        for p in plans
        if p.name in confirmed
    ]
    expected = unbeaten(means if means else plans)
    chosen = to_train_long(plans, repeats)
    assert {p.name for p in chosen} == {p.name for p in expected}
    assert [p.cost for p in chosen] == sorted(p.cost for p in chosen)


def test_a_lucky_plan_is_not_trained_long() -> None:
    plans = told([(0.5, 90.0), (0.5, 80.0), (0.7, 85.0), (0.3, 60.0)])
    repeats = {"0000": [70.0, 72.0], "0001": [79.0, 81.0], "0002": [84.0]}
    assert names(to_train_long(plans, repeats)) == ["0001", "0002"]
    assert names(to_train_long(plans, {})) == ["0003", "0000"]


def test_without_plans_nothing_is_trained_again() -> None:
    assert to_confirm([], 1.0) == to_train_long([], {}) == []


@pytest.mark.parametrize(("top1", "images"), [(50.0, 100), (80.0, 1000), (98.0, 50)])
def test_the_standard_error_is_that_of_a_mean_of_right_and_wrong(top1: float, images: int) -> None:
    right = round(top1 / 100 * images)
    answers = np.repeat([100.0, 0.0], [right, images - right])
    assert standard_error(top1, images) == pytest.approx(answers.std() / math.sqrt(images))


def test_the_standard_error_in_numbers() -> None:
    assert standard_error(50.0, 2500) == pytest.approx(1.0)
    assert standard_error(100.0, 10) == standard_error(0.0, 10) == 0.0
