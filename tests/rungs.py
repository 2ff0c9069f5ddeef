"""What every rule of halving must do, and rungs to try it on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from search.strategy.rungs import Floats

AmongBest = Callable[[Floats, Floats, int, float], bool]
"""Of a rung's costs [n] and accuracies [n]: is result `i` among the best 1/eta?"""

# Few different values, so that points coincide and share a cost or an accuracy.
GRID = st.tuples(
    st.integers(1, 8).map(lambda value: value / 10),
    st.integers(0, 6).map(lambda value: 70.0 + value),
)
RUNGS = st.lists(GRID, min_size=1, max_size=30).map(lambda rows: np.array(rows).T)
ETAS = st.sampled_from([1.5, 2.0, 2.5, 3.0, 4.0])
FIRST = [(2.0, 2), (2.5, 2), (3.0, 3), (4.0, 4)]
"""eta, and how many of the first results pass."""


def check_order_of_arrival(
    among_best: AmongBest, rung: Floats, eta: float, data: st.DataObject
) -> None:
    """The order of arrival does not matter."""
    costs, top1s = rung
    order = np.array(data.draw(st.permutations(range(len(costs)))))
    decided = [among_best(costs, top1s, i, eta) for i in range(len(costs))]
    shuffled = [among_best(costs[order], top1s[order], i, eta) for i in range(len(costs))]
    assert shuffled == [decided[i] for i in order]
    assert any(decided)  # somebody may always go on
    equal = {point: decided[i] for i, point in enumerate(zip(costs, top1s, strict=True))}
    assert decided == [equal[point] for point in zip(costs, top1s, strict=True)]


def check_first_arrivals(among_best: AmongBest, eta: float, passing: int) -> None:
    """The first eta results pass, though each is worse and dearer than all before."""
    costs, top1s = np.array([0.3, 0.4, 0.5, 0.6, 0.7]), np.array([75.0, 74.0, 73.0, 72.0, 71.0])
    decided = [among_best(costs[:n], top1s[:n], n - 1, eta) for n in range(1, 6)]
    assert decided == [True] * passing + [False] * (5 - passing)


def check_plain_halving(among_best: AmongBest, values: list[int], eta: float) -> None:
    """At one cost it is plain halving."""
    top1s = np.array(values, dtype=float)
    costs = np.full(len(values), 0.5)
    for i, value in enumerate(values):
        position = 1 + sum(other > value for other in values)
        expected = len(values) <= eta or position <= len(values) / eta
        assert among_best(costs, top1s, i, eta) == expected
