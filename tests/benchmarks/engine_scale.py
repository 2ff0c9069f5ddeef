"""What the driver spends on a trial, and keeps of it, as a sweep grows: 100 to 5,000 trials.

    python tests/benchmarks/engine_scale.py

Trials are made up (`simulated.py`), with the plans of the sample sweep, four at once, three epochs
each, with MO-ASHA, and MLflow in SQLite. Up to `--ray` trials, Ray Tune itself runs them. Up to
`--trials`, searcher, scheduler, recorder and MLflow are fed directly, in the order in which Ray
2.60 calls them: that leaves out Ray's own work. A row covers the
trials since the row before; the first, in which libraries load, is left out of the comparison.

Milliseconds are the driver's processor time, which other processes disturb less than the clock;
what has a thread of its own (MLflow, and Ray's) is what the main thread did not take. Memory is
what the resident set grew by. At the end a second driver starts, and repeats what the ledger holds.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from simulated import SimulatedTrial, made_up

import search.tuner
from pruners import PrunableViT
from search.check import check
from search.recorder import Recorder
from search.records.ledger import Ledger
from search.report.progress import Progress
from search.strategy.moasha import MoAsha
from search.strategy.searcher import PlanSearcher
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from search.tracking.runs import SweepRuns
from search.tracking.tracker import Tracker
from search.trial.inputs import TrialInputs

ROOT = Path(__file__).parents[2]
CONCURRENT = 4
EPOCHS = 3
ROWS = (100, 300, 1_000, 2_000, 5_000)
PARTS = ("searcher", "scheduler", "records", "MLflow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What trials cost the driver, on average.

    Attributes:
        by: What called the engine's parts.
        trials: Trials that had ended.
        ms: Part -> milliseconds per trial, of the processor; "all" is their sum and the rest.
        wall_ms: Milliseconds per trial by the clock.
        kilobytes: That the resident set grew by, per trial.
    """

    by: str
    trials: int
    ms: dict[str, float]
    wall_ms: float
    kilobytes: float


class Meter:
    """Takes the time of calls by part, and a row whenever enough trials have ended."""

    def __init__(self, by: str, sizes: list[int], settle: Callable[[], None]) -> None:
        self.by, self.sizes, self.settle = by, list(sizes), settle
        self.inner = [0.0]
        self.rows: list[Row] = []
        self.ended = 0

    def start(self) -> None:
        gc.collect()
        self.spent: Counter[str] = Counter()
        self.first, self.before = self.ended, self.now()

    def now(self) -> tuple[float, float, float]:
        return time.process_time(), time.thread_time(), time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count a call for a part, less the calls in it that count for other ones."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.thread_time() - start
                self.spent[part] += took - self.inner.pop()
                self.inner[-1] += took

        return timed

    def end_trial(self) -> None:
        self.ended += 1
        if not self.sizes or self.ended < self.sizes[0]:
            return
        self.sizes.pop(0)
        self.settle()
        cpu, main, wall = (b - a for a, b in zip(self.before, self.now(), strict=True))
        gc.collect()
        size, count = resident(), self.ended - self.first
        grown = size - self.rows_end if self.rows else 0
        self.rows_end = size
        seconds = {"all": cpu - self.spent.pop("made up", 0.0), **self.spent, "MLflow": cpu - main}
        row = Row(
            by=self.by,
            trials=self.ended,
            ms={part: 1e3 * took / count for part, took in seconds.items()},
            wall_ms=1e3 * wall / count,
            kilobytes=grown / count / 1024,
        )
        self.rows.append(row)
        print(line(row), flush=True)
        self.start()


class Parts:
    """Another object whose calls are timed."""

    def __init__(self, whole: Any, meter: Meter, part: str) -> None:
        self._whole, self._meter, self._part = whole, meter, part

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        return self._meter.timed(self._part, found) if callable(found) else found


class Metered(Recorder):
    """A recorder that counts the trials that end."""

    meter: Meter

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        super().on_trial_complete(iteration, trials, trial, **info)
        self.meter.end_trial()


@dataclass(kw_only=True)
class Engine:
    """A sweep's own parts, on the driver."""

    sweep: Sweep
    dense: PrunableViT
    searcher: PlanSearcher
    scheduler: MoAsha
    recorder: Metered
    meter: Meter


def engine_of(by: str, folder: str, trials: int, sampler: str) -> Engine:
    sets = [
        f"storage='{folder}'",
        f"name='{by}'",
        f"trials={trials}",
        f"epochs={EPOCHS}",
        f"sampler='{sampler}'",
        "halving={}",
    ]
    sweep = load_sweep(ROOT / "search" / "sweeps" / "sample.toml", sets)
    dense, space = check(sweep)
    sweep.directory.mkdir(parents=True)
    ledger = Ledger(sweep)
    runs = SweepRuns.open(sweep, dense.shape())
    tracker = Tracker(runs, ledger.journal)
    searcher = PlanSearcher(sweep, space, ledger)
    assert sweep.halving is not None
    scheduler = MoAsha(epochs=sweep.epochs, **sweep.halving.model_dump())
    progress = Progress(io.StringIO(), trials=trials, epochs=EPOCHS)
    recorder = Metered(ledger, tracker, progress, searcher)
    sizes = [*(size for size in ROWS if size < trials), trials]
    recorder.meter = Meter(by, sizes, lambda: logged(tracker))
    return Engine(
        sweep=sweep,
        dense=dense,
        searcher=searcher,
        scheduler=scheduler,
        recorder=recorder,
        meter=recorder.meter,
    )


def logged(tracker: Tracker) -> None:
    """Wait until MLflow is as far as the engine."""
    assert tracker.wait(600.0), tracker.trouble


def restart_s(engine: Engine) -> float:
    """Processor time that a driver takes to be where this one is."""
    start = time.thread_time()
    ledger = Ledger(engine.sweep)
    PlanSearcher(engine.sweep, engine.searcher.phases.proposer.space, ledger)
    assert engine.sweep.halving is not None
    scheduler = MoAsha(epochs=EPOCHS, **engine.sweep.halving.model_dump())
    scheduler.replay(ledger.past)
    assert scheduler.debug_string() == engine.scheduler.debug_string()
    return time.thread_time() - start


def feed(engine: Engine) -> None:
    """Call searcher, scheduler and recorder as Ray's controller does."""
    meter, shape = engine.meter, engine.dense.shape()
    searcher = Parts(engine.searcher, meter, "searcher")
    scheduler = Parts(engine.scheduler, meter, "scheduler")
    recorder = Parts(engine.recorder, meter, "records")
    make = meter.timed("made up", made_up)
    running: list[Any] = []
    rng = random.Random(0)
    meter.start()
    while True:
        while len(running) < CONCURRENT:
            identity = f"{rng.getrandbits(32):08x}"
            config = searcher.suggest(identity)
            if not isinstance(config, dict):
                break
            trial = SimpleNamespace(trial_id=identity, config=config, status="PENDING", epoch=-1)
            scheduler.on_trial_add(None, trial)
            recorder.on_trial_start(0, [], trial)
            running.append(trial)
        if not running:
            return
        trial = rng.choice(running)
        trial.epoch += 1
        result = make(trial.config, shape, trial.epoch)
        decision = scheduler.on_trial_result(None, trial, result)
        recorder.on_trial_result(0, [], trial, result)
        if result["done"] or decision == MoAsha.STOP:
            running.remove(trial)
            scheduler.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial.trial_id, result)
            recorder.on_trial_complete(0, [], trial)
        recorder.on_step_end(0, [])


def run_on_ray(engine: Engine) -> None:
    """Let Ray Tune run the trials, as `search.tuner` sets it up."""
    search.tuner.PlanTrial = SimulatedTrial  # type: ignore[misc, assignment]
    sweep, dense = engine.sweep, engine.dense
    inputs = TrialInputs(sweep=sweep, dense=dense, start=dense, directory=sweep.directory)
    engine.meter.start()
    search.tuner.run_trials(inputs, engine.searcher, engine.recorder, CONCURRENT)


def resident() -> int:
    """Bytes of this process that are in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def line(row: Row) -> str:
    parts = " | ".join(f"{row.ms[part]:.1f}" if part in row.ms else "" for part in PARTS)
    return (
        f"| {row.by} | {row.trials:,} | {row.ms['all']:.1f} | {parts} | {row.wall_ms:.0f} | "
        f"{row.kilobytes:.0f} |"
    )


def growth(rows: list[Row]) -> str:
    """Say by how much the last trials cost more than the early ones."""
    first, last = rows[1], rows[-1]
    time_, memory = (
        100.0 * (new / old - 1.0)
        for old, new in ((first.ms["all"], last.ms["all"]), (first.kilobytes, last.kilobytes))
    )
    return (
        f"{last.by}, a trial up to {last.trials:,} against one up to {first.trials:,}: "
        f"{time_:+.0f} % time, {memory:+.0f} % memory"
    )


def table(runs: list[list[Row]]) -> str:
    head = f"| by | trials | ms per trial | {' | '.join(PARTS)} | by the clock | KB per trial |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    lines += [line(row) for rows in runs for row in rows]
    return "\n".join([*lines, "", *(growth(rows) for rows in runs if len(rows) > 1)])


def draw(runs: list[list[Row]], path: Path) -> None:
    """Draw time and memory per trial."""
    figure = Figure(figsize=(8.0, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for rows, color in zip(runs, ("#1f2933", "#d1495b"), strict=False):
        sizes = [row.trials for row in rows[1:]]
        for axes, values in (
            (panels[0], [row.ms["all"] for row in rows[1:]]),
            (panels[1], [row.kilobytes for row in rows[1:]]),
        ):
            axes.plot(sizes, values, "o-", color=color, label=rows[0].by)
    for axes, title in zip(panels, ("driver, ms per trial", "driver, KB per trial"), strict=True):
        axes.set(xscale="log", xlabel="trials", ylim=(0.0, None))
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results/benchmarks", help="folder of table and picture")
    parser.add_argument("--trials", type=int, default=5_000, help="fed directly; 0 for none")
    parser.add_argument("--ray", type=int, default=1_000, help="trials that Ray runs; 0 for none")
    parser.add_argument("--sampler", default="nsga2", help="the same for all sizes")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    os.chdir(ROOT)  # the sweep's paths begin here
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for by, trials, run in (("fed", args.trials, feed), ("Ray", args.ray, run_on_ray)):
            if not trials:
                continue
            if by == "Ray":
                ray.init(
                    num_cpus=CONCURRENT,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            engine = engine_of(by, folder, trials, args.sampler)
            run(engine)
            runs.append(engine.meter.rows)
            if by == "fed":
                print(f"a driver that starts again: {restart_s(engine):.1f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine_scale.md").write_text(table(runs) + "\n")
    draw(runs, out / "engine_scale.png")
    print(f"\n{table(runs)}\n\n{out}/engine_scale.md and .png")


if __name__ == "__main__":
    main()
