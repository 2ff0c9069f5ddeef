"""Arms that a good engineer would set up in a day: Ray Tune over the raw share of every site.

A plan is a share per site: 0 to 0.9 of the heads and neurons of each block, 0 to 0.5 of its tokens.
`random` draws plans until one costs what is allowed. `optuna` is `OptunaSearch` with its defaults
(TPE) on two metrics, `nsga2` the same with Optuna's NSGA-II. These two cannot be kept from
proposing plans out of the range; such a plan is not trained, costs no epochs, and is reported as
top-1 0 at a cost of 1 and its distance from the range: every allowed plan beats it, and of two of
them the nearer one wins, which is what the constraint handling of NSGA-II would do.
"""

from __future__ import annotations

import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from anytime import Ended
from journal import Journal
from quality_problem import HIGH, LOW, TUNE_EPOCHS, Bench, tokens, units
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from pruners import Plan, Pruner, Step, ViTShape
from search.strategy.samplers import POPULATION
from search.sweep.spec import Sweep
from search.tuner import RAY_SETTINGS

MOST = {"unit": 0.9, "token": 0.5}
"""Largest share of a site, by family."""

PROPOSALS_PER_TRIAL = 100
"""Proposals for each trial that is trained, out of the range or not, after which an arm ends."""


class RawShares(tune.Trainable):
    """Cuts by raw shares, tunes and reports, all in one step."""

    def setup(self, config: dict[str, Any], sweep: Sweep, journal: Path) -> None:
        self.bench, self.journal = Bench(sweep), Journal(journal)
        self.config = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        number, shares = self.config["drawn"]["number"], self.config["drawn"]["shares"]
        plan = plan_of(self.bench.shape, shares)
        cost = self.bench.ratio(plan)
        what = f"{cost:.4f}x " + " ".join(f"{share:.6f}" for share in shares.values())
        outside = max(LOW - cost, cost - HIGH, 0.0)
        ended = self.journal.find(number, what)
        if ended is None:
            if outside:
                ended = Ended(number=number, what=what, cost=cost, epochs=0, top1=None)
            else:
                ended = self.bench.tried(number, what, cost, lambda: self.bench.cut(plan))
            self.journal.add(ended)
        return {
            "top1": ended.top1 if ended.top1 is not None else 0.0,
            "cost": 1.0 + outside if outside else cost,
            "epochs": ended.epochs,
            "done": True,
        }


class EpochsSpent(tune.Stopper):
    """Ends an arm when its epochs are spent."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.left -= result["epochs"]
        return bool(result["done"])

    def stop_all(self) -> bool:
        return self.left < TUNE_EPOCHS


def steps_of(dense: ViTShape) -> list[tuple[Pruner, list[str]]]:
    """Return the two methods and their sites."""
    return [(pruner, list(pruner.sites(dense))) for pruner in (units(), tokens())]


def bounds(dense: ViTShape) -> dict[str, float]:
    """Return site -> largest share."""
    return {site: MOST[pruner.family] for pruner, sites in steps_of(dense) for site in sites}


def plan_of(dense: ViTShape, shares: dict[str, float]) -> Plan:
    return Plan(
        steps=tuple(
            Step(pruner=pruner, thresholds={site: shares[site] for site in sites})
            for pruner, sites in steps_of(dense)
        )
    )


def search_random(sweep: Sweep, journal: Path, epochs: int) -> None:
    """Draw plans at random, and let Ray Tune try them."""
    bench, rng = Bench(sweep), np.random.default_rng(sweep.seed)
    most = bounds(bench.shape)
    drawn: list[dict[str, Any]] = []
    while len(drawn) < epochs // TUNE_EPOCHS:
        shares = {site: float(rng.uniform(0.0, high)) for site, high in most.items()}
        if LOW <= bench.ratio(plan_of(bench.shape, shares)) <= HIGH:
            drawn.append({"number": len(drawn), "shares": shares})
    _run(sweep, journal, epochs, config={"drawn": tune.grid_search(drawn)})


def search_optuna(sweep: Sweep, journal: Path, epochs: int, *, nsga2: bool) -> None:
    """Let Optuna propose plans through Ray Tune's own searcher."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    most = bounds(Bench(sweep).shape)
    sampler: dict[str, Any] = {"seed": sweep.seed}
    if nsga2:
        nsga = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=sweep.seed)
        sampler = {"sampler": nsga}
    search = OptunaSearch(
        space=partial(_suggest, most=most), metric=["top1", "cost"], mode=["max", "min"], **sampler
    )
    trials = PROPOSALS_PER_TRIAL * (epochs // TUNE_EPOCHS)
    _run(sweep, journal, epochs, search_alg=search, num_samples=trials)


def _suggest(trial: optuna.Trial, most: dict[str, float]) -> dict[str, Any]:
    shares = {site: trial.suggest_float(site, 0.0, high) for site, high in most.items()}
    return {"drawn": {"number": trial.number, "shares": shares}}


def _run(sweep: Sweep, journal: Path, epochs: int, **search: Any) -> None:
    os.environ |= RAY_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        tune.run(
            tune.with_parameters(RawShares, sweep=sweep, journal=journal.resolve()),
            storage_path=folder,
            stop=EpochsSpent(epochs),
            resources_per_trial={"cpu": 1},
            max_concurrent_trials=1,
            reuse_actors=True,
            fail_fast=True,
            verbose=0,
            **search,
        )
