from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import optuna
import pytest
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState

from search.strategy.samplers import POPULATION, TPE_TRIALS, make_sampler
from search.sweep.spec import Sweep

CLASSES = {
    "gp": GPSampler,
    "nsga2": NSGAIISampler,
    "nsga3": NSGAIIISampler,
    "tpe": TPESampler,
    "random": RandomSampler,
}
NAMES = sorted(CLASSES)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What Optuna logs as a warning or worse; it would land in the middle of the progress shown."""
    handler, logger = Heard(), logging.getLogger("optuna")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def tried(sampler: BaseSampler, trials: int) -> optuna.Study:
    """A study of a static space with two objectives and a constraint."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for _ in range(trials):
        trial = study.ask()
        x, y = trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", -1.0, 1.0)
        choice = trial.suggest_categorical("choice", [True, False])
        trial.set_constraint("c", y - 0.8)
        study.tell(trial, [x - y * y + 0.1 * choice, x * x])
    return study


def test_every_name_that_a_sweep_may_give_is_built() -> None:
    names = set(Sweep.model_fields["sampler"].annotation.__args__)
    assert names == {"auto", *CLASSES}
    assert {name: type(make_sampler(name, 10, 0)) for name in CLASSES} == CLASSES


def test_auto_is_tpe_while_trials_are_few() -> None:
    assert type(make_sampler("auto", 2, 0)) is TPESampler
    assert type(make_sampler("auto", TPE_TRIALS, 0)) is TPESampler
    assert type(make_sampler("auto", TPE_TRIALS + 1, 0)) is NSGAIISampler


@pytest.mark.parametrize("name", NAMES)
def test_two_objectives_are_searched_without_a_warning(name: str, heard: list[str]) -> None:
    if name == "gp":
        pytest.importorskip("greenlet", reason="without it Optuna warns that it is slow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = tried(make_sampler(name, 12, 0), 12)
    assert heard == []
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 12
    assert study.best_trials


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_what_is_drawn(name: str) -> None:
    first, same, other = (
        [t.params for t in tried(make_sampler(name, 11, seed), 11).trials] for seed in (5, 5, 6)
    )
    assert first == same
    assert all(one != another for one, another in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_a_generation_is_a_population(name: str) -> None:
    study = tried(make_sampler(name, 1000, 0), 2 * POPULATION + 5)
    key = next(k for k in study.trials[0].system_attrs if k.endswith(":generation"))
    sizes = Counter(t.system_attrs[key] for t in study.trials)
    assert sizes == {0: POPULATION, 1: POPULATION, 2: 5}
