from __future__ import annotations

import io
from pathlib import Path

import pytest

from pruners import ViTShape, cost_of
from search.check import check
from search.run import run
from search.sweep.spec import Sweep, SweepError, SweepInterruptedError
from search.sweep.toml import load_sweep
from search.tuner import is_done, prepare_directory


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Sweep]:
    """What `run` hands to the search, which is interrupted as soon as its directory stands."""
    seen: list[Sweep] = []

    def begin(sweep: Sweep, dense: object, stream: object) -> None:
        prepare_directory(sweep)
        seen.append(sweep)
        raise SweepInterruptedError("enough")

    monkeypatch.setattr("search.run.connect", lambda: None)
    monkeypatch.setattr("search.tuner.run_sweep", begin)
    return seen


def said(sweep: Sweep) -> str:
    stream = io.StringIO()
    with pytest.raises(SweepInterruptedError, match="enough"):
        run(sweep, stream)
    return stream.getvalue()


@pytest.fixture
def shape(sweep_file: Path) -> ViTShape:
    return check(load_sweep(sweep_file))[0].shape()


def test_an_absolute_budget_is_searched_said_and_stored_as_shares(
    sweep_file: Path, shape: ViTShape, begun: list[Sweep]
) -> None:
    gmacs = cost_of(shape).gmacs
    absolute = load_sweep(sweep_file, [f"budget_gmacs=[{0.6 * gmacs!r}, {0.8 * gmacs!r}]"])
    line = said(absolute)
    assert line == (
        "sweep tiny: 6 trials of 1 epochs over grouped, evit, magnitude; "
        f"0.6 to 0.8 of {gmacs:.4g} effective_gmacs, {0.6 * gmacs:.4g} to {0.8 * gmacs:.4g}\n"
    )
    (sweep,) = begun
    assert (sweep.shares.low, sweep.shares.high) == pytest.approx((0.6, 0.8))
    assert load_sweep(sweep.directory / "sweep.toml") == sweep


def test_the_same_absolute_budget_resumes_and_another_is_another_sweep(
    sweep_file: Path, shape: ViTShape, begun: list[Sweep]
) -> None:
    gmacs = cost_of(shape).gmacs
    absolute = load_sweep(sweep_file, [f"budget_gmacs=[{0.6 * gmacs!r}, {0.8 * gmacs!r}]"])
    first, second = said(absolute), said(absolute)
    assert first == second
    assert begun[0] == begun[1]
    assert not is_done(begun[0])
    other = load_sweep(sweep_file, [f"budget_gmacs=[{0.6 * gmacs!r}, {0.9 * gmacs!r}]"])
    with pytest.raises(SweepError, match="holds another sweep of this name"):
        run(other, io.StringIO())


def test_a_budget_above_the_dense_model_is_refused_before_anything(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["budget_gmacs=[1.0, 2.0]"])
    with pytest.raises(SweepError, match=r"budget_gmacs is 1 to 2 GMACs, and the dense model has"):
        run(sweep, io.StringIO())
    assert not sweep.directory.exists()
