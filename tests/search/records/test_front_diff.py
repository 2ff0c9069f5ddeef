from __future__ import annotations

import dataclasses

import pytest

from search.records.front import Front, build_front
from search.records.front_diff import change
from tests.search.trial_records import DENSE, record


def front_of(*points: tuple[str, float, float], cost: str = "effective_gmacs") -> Front:
    return build_front([DENSE, *(record(name, c, top1) for name, c, top1 in points)], cost)


BEFORE = front_of(("0001", 0.4, 60.0), ("0002", 0.6, 70.0))


def test_hypervolume_in_closed_form() -> None:
    """Rectangles up to the dense cost and down to no correct answer."""
    scale = record("0001", 0.4, 60.0).effective_gmacs / DENSE.effective_gmacs / 0.4
    changed = change(BEFORE, front_of(("0007", 0.4, 65.0)))
    cheap, dear = 0.4 * scale, 0.6 * scale
    assert changed.before == pytest.approx((dear - cheap) * 0.6 + (1 - dear) * 0.7)
    assert changed.after == pytest.approx((1 - cheap) * 0.65)


@pytest.mark.parametrize(
    ("after", "gained", "lost", "worse"),
    [
        ([("0001", 0.4, 60.0), ("0002", 0.6, 70.0)], (), (), False),
        ([("0001", 0.4, 61.0), ("0002", 0.6, 70.0)], ("0001",), (), False),
        ([("0003", 0.3, 60.0), ("0002", 0.6, 70.0)], ("0003",), (), False),
        ([("0003", 0.35, 71.0)], ("0003",), (), False),  # better than both
        ([("0002", 0.6, 70.0)], (), ("0001",), True),
        ([("0001", 0.4, 59.9), ("0002", 0.6, 70.0)], (), ("0001",), True),
        ([("0005", 0.5, 69.0)], ("0005",), ("0001", "0002"), True),
        ([], (), ("0001", "0002"), True),
    ],
)
def test_points_gained_and_lost(
    after: list, gained: tuple[str, ...], lost: tuple[str, ...], worse: bool
) -> None:
    changed = change(BEFORE, front_of(*after))
    assert (changed.gained, changed.lost) == (gained, lost)
    assert changed.is_worse == worse


def test_it_is_said_in_a_line() -> None:
    changed = change(BEFORE, front_of(("0001", 0.4, 61.0)))
    line = changed.describe()
    assert line.endswith("points gained: 0001; lost: 0002")
    assert line.startswith(f"hypervolume {changed.before:.4f} before, {changed.after:.4f} now (")
    from_nothing = change(front_of(), BEFORE)
    assert "(" not in from_nothing.describe().split(";")[0]


def test_another_cost_is_compared_by_the_later_one() -> None:
    other = dataclasses.replace(BEFORE, cost="gmacs")
    assert change(other, BEFORE) == change(BEFORE, BEFORE)
