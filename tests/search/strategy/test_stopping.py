from __future__ import annotations

from typing import Any

import pytest

from pruners import Plan
from search.space.space import Proposal
from search.strategy.proposer import Told
from search.strategy.stopping import why_stop
from search.sweep.spec import Sweep


def sweep_with(**changes: Any) -> Sweep:
    return Sweep.model_validate(
        {
            "name": "a",
            "budget": [0.3, 0.9],
            "trials": 50,
            "epochs": 1,
            "model": {"name": "x"},
            "data": {"train": "t", "val": "v", "test": "s"},
            "steps": [{"method": "magnitude"}],
            **changes,
        }
    )


def told(points: list[tuple[float, float]]) -> list[Told]:
    nothing = Proposal(parameters={}, plan=Plan(steps=()), cost_ratio=1.0)
    return [
        Told(name=f"{i:04d}", proposal=nothing, top1=top1, cost=cost)
        for i, (cost, top1) in enumerate(points)
    ]


def test_it_stops_after_its_trials() -> None:
    sweep = sweep_with(trials=7)
    assert why_stop(sweep, 6, 1e9, []) == ""
    assert why_stop(sweep, 7, 0.0, []) == why_stop(sweep, 8, 0.0, []) == "7 trials"


def test_it_stops_after_its_hours() -> None:
    sweep = sweep_with(max_hours=1.5)
    assert why_stop(sweep, 3, 5399.0, []) == ""
    assert why_stop(sweep, 3, 5400.0, []) == "max_hours = 1.5 have passed"


# Against cost 1 and top-1 0: 0.5 x 0.4 = 0.2, then another rectangle of (1 - cost) x 0.1 above.
FIRST = (0.5, 40.0)


@pytest.mark.parametrize(
    ("cost", "grown"), [(0.5, 0.25), (0.6, 0.2), (0.8, 0.1), (0.9, 0.05), (0.98, 0.01)]
)
def test_it_stops_when_the_area_below_the_front_grows_too_little(cost: float, grown: float) -> None:
    plans = told([FIRST, (cost, 50.0)])
    assert why_stop(sweep_with(patience=1, min_growth=0.99 * grown), 3, 0.0, plans) == ""
    reason = why_stop(sweep_with(patience=1, min_growth=1.01 * grown), 3, 0.0, plans)
    assert reason.startswith(f"the hypervolume grew by {100 * grown:.2g} % in the last 1 trials")
    assert reason.endswith(f"min_growth = {101 * grown:g} %")


def test_patience_counts_the_last_trials_in_the_order_in_which_they_ended() -> None:
    plans = told([FIRST, (0.5, 50.0), (0.9, 45.0), (0.9, 46.0), (0.7, 30.0)])
    for patience, stops in ((1, True), (2, True), (3, True), (4, False)):
        sweep = sweep_with(patience=patience, min_growth=0.1)
        assert bool(why_stop(sweep, 6, 0.0, plans)) is stops
    assert why_stop(sweep_with(patience=1, min_growth=0.1), 6, 0.0, plans[:2]) == ""


def test_it_does_not_stop_before_there_is_something_to_compare_with() -> None:
    plans = told([FIRST] * 3)
    assert why_stop(sweep_with(patience=3), 4, 0.0, plans) == ""
    assert why_stop(sweep_with(patience=2), 4, 0.0, plans) != ""
    nothing = told([(1.2, 80.0)] * 3)
    assert why_stop(sweep_with(patience=3), 4, 0.0, nothing) == ""
    assert why_stop(sweep_with(patience=2), 4, 0.0, nothing) != ""


def test_without_patience_it_goes_on_however_little_comes_of_it() -> None:
    for point in (FIRST, (1.2, 80.0)):
        assert why_stop(sweep_with(patience=0), 49, 1e9, told([point] * 40)) == ""


def test_no_growth_at_all_is_too_little_whatever_is_asked_for() -> None:
    plans = told([FIRST, (0.9, 30.0)])
    assert "grew by 0 %" in why_stop(sweep_with(patience=1, min_growth=0.0), 3, 0.0, plans)
    better = told([FIRST, (0.5, 40.1)])
    assert why_stop(sweep_with(patience=1, min_growth=0.0), 3, 0.0, better) == ""


def test_plans_that_are_slower_than_the_dense_model_add_nothing() -> None:
    plans = told([(1.1, 80.0), (1.2, 90.0)])
    assert "grew by 0 %" in why_stop(sweep_with(patience=1), 3, 0.0, plans)
    assert why_stop(sweep_with(patience=1), 3, 0.0, told([(1.1, 80.0), FIRST])) == ""
