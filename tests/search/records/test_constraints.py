from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.records.constraints import violated, violations
from search.sweep.parts import Constraints

FIGURES = {"params": 5e6, "images_per_s": 900.0, "drop": 1.5}
BOUNDS = {"max_params": 4_000_000, "min_images_per_s": 1000.0, "max_drop": 1.0}
EXCESS = {"max_params": 1e6, "min_images_per_s": 100.0, "max_drop": 0.5}


@pytest.mark.parametrize("name", BOUNDS)
def test_each_bound_alone_is_violated_by_its_excess(name: str) -> None:
    alone = Constraints(**{name: BOUNDS[name]})
    assert violations(alone, **FIGURES) == {name: EXCESS[name]}


@pytest.mark.parametrize(
    ("name", "holds"), [("max_params", 6e6), ("min_images_per_s", 800.0), ("max_drop", 2.0)]
)
def test_a_bound_that_holds_is_negative_and_says_nothing(name: str, holds: float) -> None:
    kept = Constraints(**{name: holds})
    assert violations(kept, **FIGURES)[name] < 0.0
    assert violated(kept, **FIGURES) == ""


def test_at_its_bound_a_constraint_holds() -> None:
    bounds = Constraints(max_params=5_000_000, min_images_per_s=900.0, max_drop=1.5)
    assert violations(bounds, **FIGURES) == dict.fromkeys(BOUNDS, 0.0)
    assert violated(bounds, **FIGURES) == ""


def test_without_bounds_nothing_is_violated() -> None:
    assert violations(Constraints(), **FIGURES) == {}
    assert violated(Constraints(), **FIGURES) == ""


@pytest.mark.parametrize(
    ("unknown", "name"),
    [("params", "max_params"), ("images_per_s", "min_images_per_s"), ("drop", "max_drop")],
)
def test_an_unknown_figure_is_left_out(unknown: str, name: str) -> None:
    found = violations(Constraints(**BOUNDS), **{**FIGURES, unknown: None})
    assert found == {key: excess for key, excess in EXCESS.items() if key != name}
    assert name not in violated(Constraints(**BOUNDS), **{**FIGURES, unknown: None})


def test_a_figure_of_zero_is_known() -> None:
    figures = {"params": 0.0, "images_per_s": 0.0, "drop": 0.0}
    found = violations(Constraints(**BOUNDS), **figures)
    assert found == {"max_params": -4e6, "min_images_per_s": 1000.0, "max_drop": -1.0}


def test_what_is_violated_is_said_with_figure_and_bound() -> None:
    assert violated(Constraints(**BOUNDS), **FIGURES) == (
        "params 5e+06 beyond max_params = 4e+06, "
        "images_per_s 900 beyond min_images_per_s = 1000, "
        "drop 1.5 beyond max_drop = 1"
    )
    assert violated(Constraints(**{**BOUNDS, "max_drop": 2.0}), **FIGURES).count("beyond") == 2


figures = st.one_of(st.none(), st.floats(-1e3, 1e3), st.just(math.nan))


@settings(deadline=None)
@given(figures, figures, figures)
def test_text_and_numbers_agree(
    params: float | None, images_per_s: float | None, drop: float | None
) -> None:
    bounds = Constraints(max_params=10, min_images_per_s=20.0, max_drop=30.0)
    known = {"params": params, "images_per_s": images_per_s, "drop": drop}
    beyond = {name for name, value in violations(bounds, **known).items() if value > 0.0}
    shown = violated(bounds, **known)
    assert {name for name in BOUNDS if f"beyond {name} = " in shown} == beyond
