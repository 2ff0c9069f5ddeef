from __future__ import annotations

import math

import pytest

from search.records.front import build_front
from tests.search.trial_records import DENSE, record


def test_only_finished_finite_trials_enter_the_front() -> None:
    records = [
        record("0001", 0.5, 70.0),
        record("0002", 0.4, 99.0, "failed"),
        record("0003", 0.3, 99.0, "stopped"),
        record("0004", 0.2, 99.0, "running"),
        record("0005", 0.2, math.nan),
        record("0006", 0.2, None),
        record("0007", 0.6, 60.0),
        DENSE,
    ]
    front = build_front(records, "effective_gmacs")
    assert [m.trial for m in front.members] == ["0001"]
    assert front.dense == DENSE
    assert front.hypervolume == pytest.approx(0.5 * 0.7)


def test_the_chosen_cost_decides() -> None:
    a, b = record("0001", 0.5, 70.0), record("0002", 0.4, 65.0, gmacs=1.5)
    assert len(build_front([DENSE, a, b], "effective_gmacs").members) == 2
    assert [m.trial for m in build_front([DENSE, a, b], "gmacs").members] == ["0001"]


def test_a_front_needs_the_dense_model() -> None:
    with pytest.raises(ValueError, match="measure the dense model first"):
        build_front([record("0001", 0.5, 70.0)], "gmacs")
