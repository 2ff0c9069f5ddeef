from __future__ import annotations

import math

import pytest

from search.sweep.milestones import milestones


@pytest.mark.parametrize(
    ("epochs", "first", "eta", "expected"),
    [
        (9, 1, 3.0, [1, 3]),  # the full length is no rung
        (10, 1, 3.0, [1, 3, 9]),
        (30, 0, 3.0, [0, 1, 3, 9, 27]),
        (3, 0, 2.0, [0, 1, 2]),
        (1, 0, 2.0, [0]),
        (12, 2, 2.0, [2, 4, 8]),
        (8, 1, math.sqrt(2.0), [1, 2, 4, 5]),  # 2.83 and 5.66 rounded down, each epoch once
        (40, 3, 10 / 3, [3, 10, 33]),
    ],
)
def test_milestones(epochs: int, first: int, eta: float, expected: list[int]) -> None:
    assert milestones(epochs, first, eta) == expected


@pytest.mark.parametrize(
    ("epochs", "first", "eta", "message"),
    [
        (9, 1, 1.0, "eta is 1.0; give a number above 1"),
        (9, 1, math.inf, "eta is inf"),
        (9, 1, math.nan, "eta is nan"),
        (9, 9, 3.0, "first is 9 of 9 epochs; give 0 <= first < epochs"),
        (9, -1, 3.0, "first is -1"),
        (0, 0, 3.0, "first is 0 of 0 epochs"),
    ],
)
def test_impossible_milestones_are_refused(
    epochs: int, first: int, eta: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        milestones(epochs, first, eta)
