"""Seconds of a trial that are neither training nor evaluation: this engine, and a plain Ray loop.

    python tests/benchmarks/engine_overhead.py

Both run the same trials (on sixteen images, one epoch) one after another, with MLflow
in SQLite and a checkpoint per epoch, in turn. The plain loop is what one writes first: a function
that opens the data, reports and saves, `OptunaSearch`, `MLflowLoggerCallback`, and nothing set
otherwise. Counted is the time from one trial's end to the next one's, less what the trial itself
reports as seconds; the first trial of each, which also starts Ray's machinery, is left out.
Proposing is part of it: the engine's share is given apart, since it pays for plans that meet their
budget.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.search.optuna import OptunaSearch

from pruners import PrunableViT
from search.check import check
from search.recorder import Recorder
from search.records.events import TrialConfig
from search.records.ledger import Ledger
from search.records.trial_record import model_path
from search.report.progress import Progress
from search.space.space import Space
from search.strategy.searcher import PlanSearcher
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from search.tracking.runs import SweepRuns
from search.tracking.tracker import Tracker
from search.trial.inputs import TrialInputs
from search.trial.trial import Trial
from search.trial.workers import OneWorker
from search.tuner import RAY_SETTINGS, run_trials

ROOT = Path(__file__).parents[2]
IMAGES = 16
GOAL_S = 0.3


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each trial but the first: all that is not its own, and of that proposing."""

    loop: str
    overhead: tuple[float, ...]
    proposing: tuple[float, ...] | None


class Ends(tune.Callback):
    """Notes when each trial ended, and what it took of its own."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ends.append((time.perf_counter(), trial.last_result["seconds"]))

    def overhead(self) -> tuple[float, ...]:
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return tuple(end - before - seconds for (before, _), (end, seconds) in pairs)


class TimedRecorder(Recorder):
    """A recorder that notes the same."""

    ends: Ends

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        super().on_trial_complete(iteration, trials, trial, **info)
        self.ends.on_trial_complete(iteration, trials, trial)


class TimedSearcher(PlanSearcher):
    """A searcher that notes how long a proposal took."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        start = time.perf_counter()
        config = super().suggest(trial_id)
        if isinstance(config, dict):
            self.__dict__.setdefault("seconds", []).append(time.perf_counter() - start)
        return config


def run_engine(sweep: Sweep, dense: PrunableViT, space: Space) -> Row:
    """Run a sweep's trials as `python -m search run` does."""
    sweep.directory.mkdir(parents=True)
    ledger = Ledger(sweep)
    runs = SweepRuns.open(sweep, dense.shape())
    tracker = Tracker(runs, ledger.journal)
    progress = Progress(io.StringIO(), trials=sweep.trials, epochs=sweep.epochs)
    searcher = TimedSearcher(sweep, space, ledger)
    recorder = TimedRecorder(ledger, tracker, progress, searcher)
    recorder.ends = Ends()
    inputs = TrialInputs(sweep=sweep, dense=dense, start=dense, directory=sweep.directory)
    run_trials(inputs, searcher, recorder, 1)
    proposing = tuple(searcher.__dict__["seconds"][1:])
    return Row(loop="this engine", overhead=recorder.ends.overhead(), proposing=proposing)


def train(config: dict[str, Any], inputs: TrialInputs, space: Space) -> None:
    """Train a plan in a plain function, as a trial of the engine does."""

    proposal = space.propose(config)
    one = TrialConfig(
        trial="0001",
        origin="search",
        plan=json.dumps(proposal.plan.to_json()),
        learned="",
        parameters={},
        of="",
        seed=0,
        epochs=inputs.sweep.epochs,
        cost_ratio=proposal.cost_ratio,
    )
    trial, done = Trial.first(inputs, one, OneWorker()), False
    while not done:
        result = trial.step()
        done = result.done
        model = inputs.directory / model_path("0001", result.epoch)
        tune.report(result.to_json(), checkpoint=tune.Checkpoint.from_directory(model))


def run_plain(sweep: Sweep, dense: PrunableViT, space: Space, folder: str) -> Row:
    """Run as many trials with Ray Tune's own parts and its defaults."""
    ends = Ends()
    inputs = TrialInputs(sweep=sweep, dense=dense, start=dense, directory=Path(folder, "saved"))
    mlflow = MLflowLoggerCallback(
        tracking_uri=f"sqlite:///{folder}/plain.db", experiment_name=sweep.name
    )
    tune.run(
        tune.with_parameters(train, inputs=inputs, space=space),
        name="plain",
        storage_path=folder,
        search_alg=OptunaSearch(
            space.sample,
            metric=["val_top1", "cost_ratio"],
            mode=["max", "min"],
        ),
        num_samples=sweep.trials,
        max_concurrent_trials=1,
        resources_per_trial={"cpu": 1},
        callbacks=[mlflow, ends],
        verbose=0,
    )
    return Row(loop="plain Ray Tune", overhead=ends.overhead(), proposing=None)


def few_images(folder: str, name: str, trials: int) -> Sweep:
    """The sample sweep on so few images that hardly anything but the engine is left."""
    path = Path(folder) / "few.parquet"
    pq.write_table(pq.read_table("search/sample/val.parquet").slice(0, IMAGES), path)
    sets = [f"data.{split}='{path}'" for split in ("train", "val", "test")]
    sets += ["data.batch_size=8", "data.calibration=8", f"data.cache_dir='{folder}/cache'"]
    sets += [
        f"storage='{folder}'",
        f"name='{name}'",
        f"trials={trials}",
        "epochs=1",
        "halving=false",
    ]
    return load_sweep(Path("search/sweeps/sample.toml"), sets)


def merged(rows: list[Row]) -> Row:
    """Put the rounds of a loop together."""
    proposing = [row.proposing for row in rows if row.proposing is not None]
    return Row(
        loop=rows[0].loop,
        overhead=tuple(seconds for row in rows for seconds in row.overhead),
        proposing=tuple(seconds for part in proposing for seconds in part) or None,
    )


def table(engine: Row, plain: Row) -> str:
    lines = [
        "| loop | overhead of a trial, s | its quartiles | proposing, s | less |",
        "|---|---|---|---|---|",
    ]
    base = statistics.median(plain.overhead)
    for row in (engine, plain):
        low, middle, high = statistics.quantiles(row.overhead, n=4)
        own = "" if row.proposing is None else f"{statistics.median(row.proposing):.3f}"
        lines.append(
            f"| {row.loop} | {middle:.2f} | {low:.2f} to {high:.2f} | {own} | "
            f"{base / middle:.1f} times |"
        )
    return "\n".join([*lines, "", f"medians over {len(engine.overhead)} trials each"])


def draw(engine: Row, plain: Row, path: Path) -> None:
    """Draw every trial's overhead, and the goal."""
    figure = Figure(figsize=(6.0, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, color in ((engine, "#d1495b"), (plain, "#9aa5b1")):
        axes.plot(row.overhead, "o-", color=color, ms=4, label=row.loop)
    axes.axhline(GOAL_S, color="#1f2933", lw=0.8, ls="--", label=f"{GOAL_S} s")
    axes.set(yscale="log", xlabel="trial", ylabel="overhead, s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results/benchmarks", help="folder of table and picture")
    parser.add_argument("--trials", type=int, default=12, help="of each loop, a round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    os.chdir(ROOT)  # the sweep's paths begin here
    os.environ |= RAY_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rounds: list[tuple[Row, Row]] = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            sweep = few_images(folder, f"round-{number}", args.trials)
            dense, space = check(sweep)
            engine, plain = run_engine(sweep, dense, space), run_plain(sweep, dense, space, folder)
            rounds.append((engine, plain))
            print(table(engine, plain), flush=True)
    engine, plain = (merged(list(rows)) for rows in zip(*rounds, strict=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine_overhead.md").write_text(table(engine, plain) + "\n")
    draw(engine, plain, out / "engine_overhead.png")
    print(f"\n{table(engine, plain)}\n\n{out}/engine_overhead.md and .png")


if __name__ == "__main__":
    main()
