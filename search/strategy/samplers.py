"""Optuna's samplers by name, and which one a sweep of so many trials gets."""

from __future__ import annotations

import warnings

import optuna
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

TPE_TRIALS = 1_000
"""Trials up to which TPE is asked: beyond, its suggestions take longer and longer."""

POPULATION = 20
"""Size of a generation of NSGA-II and NSGA-III."""


def make_sampler(name: str, trials: int, seed: int) -> BaseSampler:
    """Build a sampler.

    Args:
        name: "gp", "nsga2", "nsga3", "tpe", "random", or "auto": what measured best for that many
            trials (`tests/benchmarks/search_quality_simulated.py`).
        trials: Trials of the sweep.
        seed: Seed of everything that it draws.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name == "auto":
        name = "tpe" if trials <= TPE_TRIALS else "nsga2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "nsga2":
            return NSGAIISampler(seed=seed, population_size=POPULATION)
        if name == "nsga3":
            return NSGAIIISampler(seed=seed, population_size=POPULATION)
        if name == "random":
            return RandomSampler(seed=seed)
        if name == "tpe":
            return TPESampler(seed=seed)
        return GPSampler(seed=seed)
