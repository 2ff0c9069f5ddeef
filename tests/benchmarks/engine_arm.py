"""This engine as arms: a whole sweep as `python -m search run` runs it, and variants of it."""

from __future__ import annotations

import math

from anytime import Ended
from quality_problem import TUNE_EPOCHS, Settings

from pruners.families.learned import Learned
from search.check import check
from search.prepare.elastic import PASSES
from search.prepare.learning import FOLDER
from search.records.files import read_trials
from search.records.trial_record import TrialRecord
from search.sweep.milestones import milestones
from search.sweep.spec import Sweep
from search.tuner import is_done, run_sweep

VARIANTS: dict[str, tuple[str, ...]] = {
    "engine": (),
    "engine_whole": ("halving=false",),
    "engine_halving_tuned": ("halving.first=1",),
    "engine_elastic": ("elastic_epochs=1",),
    "engine_units": ("steps=[{method='grouped'}]",),  # as Torch-Pruning, which cuts no tokens
    "engine_no_refine": ("refine=0.0",),
    "engine_tpe": ("sampler='tpe'",),
    "engine_nsga2": ("sampler='nsga2'",),
    "engine_random": ("sampler='random'",),
}
"""Arm -> what it overrides of a sweep's defaults."""

GO_ON = 1.6
"""How many in eta go on, as measured: a search gets better, so that more than one of its later
trials is among the best."""


def sweep_of(settings: Settings, arm: str, seed: int) -> Sweep:
    """Return an arm's sweep, of as many trials as its epochs are expected to be enough for."""
    sets = VARIANTS[arm]
    sweep = settings.sweep(f"{arm}-{seed}", seed, *sets)
    left = settings.epochs - PASSES * sweep.elastic_epochs
    return settings.sweep(f"{arm}-{seed}", seed, *sets, f"trials={1 + trials_for(sweep, left)}")


def trials_for(sweep: Sweep, epochs: int) -> int:
    """Return how many trials so many epochs are expected to be enough for.

    The ladder's run to their end; of others `GO_ON` in eta go on at each rung.
    """
    whole = epochs // TUNE_EPOCHS
    if sweep.halving is None:
        return whole
    first = min(whole, sweep.ladder)
    return first + math.ceil((epochs - TUNE_EPOCHS * first) / _expected_epochs(sweep) - 1e-9)


def _expected_epochs(sweep: Sweep) -> float:
    epochs, alive, before = 0.0, 1.0, 0
    for rung in milestones(TUNE_EPOCHS, sweep.halving.first, sweep.halving.eta):
        epochs, before = epochs + alive * (rung - before), rung
        alive *= min(1.0, GO_ON / sweep.halving.eta)
    return epochs + alive * (TUNE_EPOCHS - before)


def run_engine(settings: Settings, arm: str, seed: int) -> None:
    """Run an arm's sweep, or the rest of it; Ray must be connected."""
    sweep = sweep_of(settings, arm, seed)
    if is_done(sweep):
        return
    dense, _ = check(sweep)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    with (sweep.directory / "progress.log").open("a") as stream:
        run_sweep(sweep, dense, stream)


def engine_trials(settings: Settings, arm: str, seed: int) -> list[Ended]:
    """Return the trials of an arm that have ended so far; the dense model's is none of them."""
    sweep = sweep_of(settings, arm, seed)
    path = sweep.directory / "trials.parquet"
    records = read_trials(path) if path.exists() else []
    trials = [_ended(r) for r in records if r.status not in ("running", "dense")]
    if trials and sweep.elastic_epochs:
        trials.insert(0, _start(sweep))
    return trials


def scoring_s(settings: Settings) -> float:
    """Return the seconds in which the sweeps' methods scored the dense model, once per seed."""
    files = list((settings.folder / "sweeps" / FOLDER).glob("*.safetensors"))
    return sum(Learned.load(file).report["seconds"] for file in files) / max(1, len(files))


def _start(sweep: Sweep) -> Ended:
    """The elastic start, as a trial that trains and tunes no cut."""
    return Ended(
        number=-1,
        what="elastic start",
        cost=1.0,
        epochs=PASSES * sweep.elastic_epochs,
        top1=None,
    )


def _ended(record: TrialRecord) -> Ended:
    before = record.history[0] if record.history else {}
    return Ended(
        number=int(record.trial),
        what=f"{record.cost_ratio:.4f}x {record.origin}: {record.plan_line}",
        cost=record.cost_ratio,
        epochs=record.epochs,
        top1=record.val_top1 if record.status == "finished" else None,
        untuned=before.get("val_top1"),
        before_s=before.get("seconds", 0.0),
        train_s=record.seconds - before.get("seconds", 0.0),
    )
