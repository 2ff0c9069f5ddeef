from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.strategy.rungs import (
    BAND,
    Floats,
    bracket_of,
    bracket_weights,
    trend,
    within_band,
)
from tests.rungs import (
    ETAS,
    FIRST,
    RUNGS,
    check_first_arrivals,
    check_order_of_arrival,
    check_plain_halving,
)


def random_rung(n: int, seed: int) -> tuple[Floats, Floats]:
    """Results of a rung: accuracy rises with cost and falls with how badly a plan is chosen."""
    generator = np.random.default_rng(seed)
    costs = generator.uniform(0.3, 0.8, n)
    return costs, 76 + 10 * np.log(costs) - generator.exponential(2.0, n)


def test_brackets_start_in_the_proportions_of_hyperband() -> None:
    # Li et al., table 1: R = 81, eta = 3 starts 81, 27, 9, 6, 5 trials, rounded up from these.
    weights = bracket_weights(4, 3.0, 5)
    np.testing.assert_allclose(weights / weights[-1], [81 / 5, 27 / 4, 9 / 3, 3 / 2, 1])
    assert weights.sum() == pytest.approx(1.0)
    fewer = bracket_weights(4, 3.0, 2)
    np.testing.assert_allclose(fewer[0] / fewer[1], (81 / 5) / (27 / 4))


@pytest.mark.parametrize("brackets", [0, 4])
def test_a_bracket_without_a_start_is_refused(brackets: int) -> None:
    with pytest.raises(ValueError, match=f"brackets is {brackets}, with 2 rungs; give 1 <= brack"):
        bracket_weights(2, 3.0, brackets)
    assert len(bracket_weights(2, 3.0, 3)) == 3  # the last one runs at full length


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9000), st.integers(5, 200), ETAS, st.integers(1, 5))
def test_any_run_of_trials_is_spread_in_proportion(
    start: int, count: int, eta: float, brackets: int
) -> None:
    weights = bracket_weights(4, eta, brackets)
    chosen = [bracket_of(number, weights) for number in range(start, start + count)]
    got = np.bincount(chosen, minlength=brackets)
    assert len(got) == brackets
    assert np.abs(got - count * weights).max() <= 3  # drawn at random: up to 3 sqrt(count) / 2


@settings(max_examples=60, deadline=None)
@given(rung=RUNGS, eta=ETAS, data=st.data())
def test_the_order_of_arrival_does_not_matter(
    rung: Floats, eta: float, data: st.DataObject
) -> None:
    check_order_of_arrival(within_band, rung, eta, data)


@pytest.mark.parametrize(("eta", "passing"), FIRST)
def test_the_first_eta_arrivals_pass(eta: float, passing: int) -> None:
    check_first_arrivals(within_band, eta, passing)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), ETAS)
def test_at_one_cost_it_is_plain_halving(values: list[int], eta: float) -> None:
    check_plain_halving(within_band, values, eta)


def test_the_cheapest_result_passes_however_bad() -> None:
    costs, top1s = random_rung(30, seed=0)
    cheapest = int(costs.argmin())
    top1s[cheapest] = 1.0
    assert within_band(costs, top1s, cheapest, 3.0)
    second = int(np.argsort(costs)[1])
    top1s[second] = 1.0
    assert not within_band(costs, top1s, second, 3.0)
    costs[second] = costs[cheapest]  # two cheapest ones are compared as all others are
    assert not within_band(costs, top1s, second, 3.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(0, 200), st.floats(0.5, 40.0), ETAS)
def test_a_trend_over_cost_changes_nobodys_standing(
    n: int, seed: int, slope: float, eta: float
) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.uniform(0.3, 0.8, n)
    # Accuracy rises with cost between any two results, so that no band's trend is cut off at 0.
    top1s = np.cumsum(generator.exponential(1.0, n))[np.argsort(np.argsort(costs))]
    steeper = top1s + slope * np.log(costs)
    for i in range(n):
        assert within_band(costs, steeper, i, eta) == within_band(costs, top1s, i, eta)


@pytest.mark.parametrize("eta", [2.0, 3.0])
def test_only_results_of_similar_cost_count(eta: float) -> None:
    costs, top1s = random_rung(50, seed=1)
    costs, top1s = costs[np.argsort(costs)], top1s[np.argsort(costs)]
    width = math.ceil(BAND * eta)
    changes = []
    for i in range(1, 50):
        near = np.argsort(np.abs(np.log(costs / costs[i])))[:width]
        far = np.setdiff1d(np.arange(50), near)
        decided = within_band(costs, top1s, i, eta)
        for change in (-30.0, 30.0):
            other = top1s.copy()
            other[far] += change
            assert within_band(costs, other, i, eta) == decided
            other[near] += 2 * change * (near != i)  # and all of those near do
            changes.append(within_band(costs, other, i, eta) != decided)
    assert np.mean(changes) > 0.4


def test_about_one_in_eta_is_kept_at_every_cost() -> None:
    kept = np.zeros((40, 60), dtype=bool)
    for seed in range(40):
        costs, top1s = random_rung(60, seed)
        order = np.argsort(costs)
        costs, top1s = costs[order], top1s[order]
        kept[seed] = [within_band(costs, top1s, i, 3.0) for i in range(60)]
    thirds = kept[:, 1:-1].reshape(40, 2, 29).mean(axis=(0, 2))
    assert np.all((thirds > 0.27) & (thirds < 0.40))


def test_the_spread_of_residuals_may_differ_with_cost() -> None:
    # Cheap plans differ ten times as much as dear ones: both halves still get their share.
    kept = np.zeros((20, 60), dtype=bool)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        costs = np.sort(generator.uniform(0.3, 0.8, 60))
        noise = generator.normal(0, np.where(np.arange(60) < 30, 5.0, 0.5))
        kept[seed] = [
            within_band(costs, 76 + 10 * np.log(costs) + noise, i, 3.0) for i in range(60)
        ]
    cheap, dear = kept[:, :30].mean(), kept[:, 30:].mean()
    assert 0.28 < cheap < 0.42
    assert 0.28 < dear < 0.42


@pytest.mark.parametrize("slope", [0.0, 10.0, 100.0])
def test_who_is_well_above_the_trend_passes_at_every_cost(slope: float) -> None:
    costs = np.random.default_rng(6).permutation(np.geomspace(0.3, 0.8, 41))
    kind = np.argsort(np.argsort(costs)) % 4  # of four neighbours, one well above, one well below
    above = np.array([3.0, 0.0, -3.0, 0.1])[kind]
    top1s = 70 + slope * np.log(costs) + above
    for i in range(41):
        if kind[i] == 0:
            assert within_band(costs, top1s, i, 3.0)
        if kind[i] == 2:
            assert not within_band(costs, top1s, i, 3.0)


def test_trend_is_the_slope_of_a_line() -> None:
    x = np.array([0.3, -1.0, 2.0, 0.3, 1.1])
    assert trend(x, 3.5 * x + 2.0) == pytest.approx(3.5)
    assert trend(x, -3.5 * x) == 0.0
    assert trend(np.full(4, 0.7), np.arange(4.0)) == 0.0
    assert trend(np.zeros(1), np.zeros(1)) == 0.0


def test_a_few_bad_plans_do_not_bend_the_trend() -> None:
    x = np.linspace(0.0, 1.0, 12)
    y = 3.0 * x + np.random.default_rng(3).normal(0, 0.1, 12)
    y[[10, 11]] -= 20.0
    assert abs(trend(x, y) - 3.0) < 1.0
    assert np.polyfit(x, y, 1)[0] < -5.0  # a least-squares line is bent


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20)), min_size=2, max_size=12))
def test_trend_makes_residuals_least_dispersed(points: list[tuple[int, int]]) -> None:
    # Jaeckel, 1972: the weighted median slope minimises the sum of |residual differences|.
    x, y = np.array(points, dtype=float).T
    pairs = [(i, j) for i, j in itertools.combinations(range(len(x)), 2) if x[i] != x[j]]

    def dispersion(slope: float) -> float:
        return sum(abs((y[i] - y[j]) - slope * (x[i] - x[j])) for i, j in pairs)

    slopes = [(y[i] - y[j]) / (x[i] - x[j]) for i, j in pairs]
    least = min((dispersion(max(0.0, slope)) for slope in slopes), default=0.0)
    assert dispersion(trend(x, y)) == pytest.approx(least)
