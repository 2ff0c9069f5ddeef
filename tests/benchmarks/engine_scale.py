"""What the driver spends on a trial, and keeps of it, as a sweep grows: 100 to 5,000 trials.

    python tests/benchmarks/engine_scale.py

Trials are made up (`simulated.py`), with the plans of the sample sweep, four at once, three epochs
each, MO-ASHA and MLflow in SQLite. Up to `--ray` trials, Ray Tune itself runs them. Up to
`--trials`, searcher, scheduler, recorder and MLflow are fed directly, in the order in which Ray
2.60 calls them: that leaves out Ray's own work, which would take an hour. A row covers the trials
since the row before. Seconds are the driver's processor time, which other processes disturb less
than the clock; memory is what the driver's resident set grew by. The snapshot is what Ray saves of
searcher, rungs and recorder, measured once per row and not counted in it: Ray takes one every 10 s
at most, and spends no more than a twentieth of the time on them.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import pickle
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
from pruners import PrunableViT, ViTShape
from search.check import check
from search.moasha import MoAsha, RungState
from search.progress import Progress
from search.recorder import Recorder
from search.searcher import PlanSearcher
from search.space import Space
from search.sweep import Sweep, load_sweep, sweep_toml
from search.tracking import Tracker
from search.trial import TrialInputs

ROOT = Path(__file__).parents[2]
CONCURRENT = 4
EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """What trials cost the driver, on average.

    Attributes:
        trials: Trials that had ended.
        seconds: Per trial and part, of the processor.
        wall: Seconds per trial by the clock.
        kilobytes: That the resident set grew by, per trial.
        snapshot_s: Of one snapshot of our own state.
    """

    trials: int
    seconds: dict[str, float]
    wall: float
    kilobytes: float
    snapshot_s: float


class Meter:
    """Takes the time of calls by part, and a row whenever enough trials have ended."""

    def __init__(self, sizes: list[int], snapshot: Callable[[], None]) -> None:
        self.sizes, self.snapshot = list(sizes), snapshot
        self.spent: Counter[str] = Counter()
        self.inner = [0.0]
        self.rows: list[Row] = []
        self.ended = 0

    def start(self) -> None:
        gc.collect()
        self.before = time.process_time(), time.perf_counter(), resident()
        self.first, self.spent = self.ended, Counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count a call for a part, less the calls in it that count for other ones."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.spent[part] += took - self.inner.pop()
                self.inner[-1] += took

        return timed

    def end_trial(self) -> None:
        self.ended += 1
        if not self.sizes or self.ended < self.sizes[0]:
            return
        self.sizes.pop(0)
        cpu, wall = time.process_time() - self.before[0], time.perf_counter() - self.before[1]
        gc.collect()
        grown, count = resident() - self.before[2], self.ended - self.first
        start = time.process_time()
        self.snapshot()
        row = Row(
            trials=self.ended,
            seconds={"all": cpu / count} | {k: v / count for k, v in self.spent.items()},
            wall=wall / count,
            kilobytes=grown / count / 1024,
            snapshot_s=time.process_time() - start,
        )
        self.rows.append(row)
        print(row, flush=True)
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

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
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

    @classmethod
    def build(cls, folder: str, trials: int, sizes: list[int], sampler: str) -> Engine:
        sets = [
            f"storage='{folder}'",
            f"trials={trials}",
            f"epochs={EPOCHS}",
            f"sampler='{sampler}'",
            "halving={}",
        ]
        sweep = load_sweep(ROOT / "search" / "sweeps" / "sample.toml", sets)
        dense, space = check(sweep)
        sweep.directory.mkdir(parents=True)
        tracker = Tracker.open(None, sweep.directory, sweep.name, sweep_toml(sweep))
        searcher, scheduler = PlanSearcher(sweep, space), None
        scheduler = MoAsha(epochs=sweep.epochs, **sweep.halving.model_dump())

        def snapshot() -> None:
            searcher.save(str(sweep.directory / "searcher.pkl"))
            states = [recorder.get_state(), RungState(scheduler).get_state()]
            (sweep.directory / "callbacks.pkl").write_bytes(pickle.dumps(states))

        meter = Meter(sizes, snapshot)
        progress = Progress(io.StringIO(), trials=trials, epochs=EPOCHS)
        recorder = Metered(sweep, Parts(tracker, meter, "MLflow"), progress)
        recorder.meter = meter
        return cls(
            sweep=sweep,
            dense=dense,
            searcher=searcher,
            scheduler=scheduler,
            recorder=recorder,
            meter=meter,
        )


def feed(engine: Engine) -> list[Row]:
    """Call searcher, scheduler and recorder as Ray's controller does."""
    meter, shape = engine.meter, engine.dense.shape()
    searcher = Parts(engine.searcher, meter, "searcher")
    scheduler = Parts(engine.scheduler, meter, "scheduler")
    recorder = Parts(engine.recorder, meter, "records")
    make = meter.timed("(made up)", made_up)
    running: list[Any] = []
    ended, rng = 0, random.Random(0)
    meter.start()
    while True:
        while len(running) < CONCURRENT:
            identity = f"{rng.getrandbits(32):08x}"
            config = searcher.suggest(identity)
            if not isinstance(config, dict):
                break
            trial = SimpleNamespace(
                trial_id=identity, config=config, status="PENDING", checkpoint=None, epoch=-1
            )
            scheduler.on_trial_add(None, trial)
            recorder.on_trial_start(0, [], trial)
            running.append(trial)
        if not running:
            return meter.rows
        trial = rng.choice(running)
        trial.epoch += 1
        result = make(trial.config, shape, trial.epoch)
        decision = scheduler.on_trial_result(None, trial, result)
        recorder.on_trial_result(0, [], trial, result)
        folder = engine.sweep.directory / "trials" / trial.config["trial"]
        trial.checkpoint = SimpleNamespace(path=str(folder / f"checkpoint_{trial.epoch:06d}"))
        if result["done"] or decision == MoAsha.STOP:
            running.remove(trial)
            scheduler.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial.trial_id, result)
            recorder.on_trial_complete(0, [], trial)
        recorder.on_step_end(0, [])


def run_on_ray(engine: Engine) -> list[Row]:
    """Let Ray Tune run the trials."""
    search.tuner.PlanTrial = SimulatedTrial
    inputs = TrialInputs(sweep=engine.sweep, dense=engine.dense, start=engine.dense)
    engine.meter.start()
    search.tuner.run_trials(
        inputs, engine.searcher, engine.recorder, CONCURRENT, resuming=False
    )
    return engine.meter.rows


def resident() -> int:
    """Bytes of this process that are in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    import sys
    os.chdir(ROOT)
    n = int(sys.argv[1]); sizes=[s for s in (100, 500, 1000, 2000, 3000, 5000) if s <= n]
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.build(folder, n, sizes, sys.argv[3])
        if sys.argv[2] == "ray":
            ray.init(num_cpus=CONCURRENT, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            run_on_ray(engine)
        else:
            feed(engine)


if __name__ == "__main__":
    main()
