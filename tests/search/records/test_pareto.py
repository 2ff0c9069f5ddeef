from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.records import pareto

numbers = st.integers(0, 6).map(float)
points = st.lists(st.tuples(numbers, numbers), min_size=0, max_size=12)


def brute_force(costs: list[float], accuracies: list[float]) -> list[bool]:
    result = []
    rows = list(zip(costs, accuracies, strict=True))
    for i, (c, a) in enumerate(rows):
        beaten = any(
            (d <= c and b >= a and (d < c or b > a)) or ((d, b) == (c, a) and j < i)
            for j, (d, b) in enumerate(rows)
        )
        result.append(not beaten)
    return result


@given(points)
def test_front_is_what_nothing_beats(rows: list[tuple[float, float]]) -> None:
    costs, accuracies = [r[0] for r in rows], [r[1] for r in rows]
    assert pareto.front(costs, accuracies).tolist() == brute_force(costs, accuracies)


def test_front_of_unsorted_points() -> None:
    costs, accuracies = [3.0, 1.0, 2.0, 2.5], [90.0, 50.0, 80.0, 70.0]
    assert pareto.front(costs, accuracies).tolist() == [True, True, True, False]


def test_hypervolume_is_the_area() -> None:
    # Rectangles up to cost 1 and accuracy 0: 0.8 x 0.5, and 0.4 x 0.3 on top of it.
    volume = pareto.hypervolume([0.6, 0.2], [0.8, 0.5], reference_cost=1.0, reference_accuracy=0.0)
    assert volume == pytest.approx(0.8 * 0.5 + 0.4 * 0.3)


def test_points_beyond_the_reference_count_nothing() -> None:
    volume = pareto.hypervolume([1.5, 0.5], [0.9, 0.1], reference_cost=1.0, reference_accuracy=0.2)
    assert volume == 0.0
    assert pareto.hypervolume([], [], reference_cost=1.0, reference_accuracy=0.0) == 0.0


@given(points.filter(bool))
def test_dominated_points_add_no_volume(rows: list[tuple[float, float]]) -> None:
    costs, accuracies = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    mask = pareto.front(costs, accuracies)
    whole, front = (
        pareto.hypervolume(costs[m], accuracies[m], reference_cost=7.0, reference_accuracy=-1.0)
        for m in (np.ones_like(mask), mask)
    )
    assert whole == pytest.approx(front)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"point 1 is \(2\.0, nan\)"):
        pareto.front([1.0, 2.0], [3.0, float("nan")])
