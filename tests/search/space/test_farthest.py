from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from search.space.farthest import farthest_first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_next_is_the_farthest_from_those_before(points: list[tuple[int, int]]) -> None:
    order = farthest_first(np.array(points, dtype=float).reshape(-1, 2)).tolist()
    assert sorted(order) == list(range(len(points)))
    assert order[:1] == [0][: len(points)]
    for place in range(1, len(points)):
        nearest = {
            i: min(math.dist(points[i], points[j]) for j in order[:place])
            for i in range(len(points))
            if i not in order[:place]
        }
        assert nearest[order[place]] == max(nearest.values())
        assert order[place] == min(i for i in nearest if nearest[i] == max(nearest.values()))


def test_a_line_goes_from_coarse_to_fine() -> None:
    assert farthest_first(np.arange(9.0)[:, None]).tolist() == [0, 8, 4, 2, 6, 1, 3, 5, 7]
