"""What starting an actor costs, and what reusing one saves.

    python tests/benchmarks/actor_start.py

Runs trials that hardly compute anything one after another, once on one reused actor and once with
an actor for each, and prints the median seconds from one trial's end to the next one's.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from ray import tune

from search.check import check
from search.sweep import Sweep
from search.sweep_file import load_sweep
from search.trial import PlanTrial, TrialInputs
from search.tuner import RAY_SETTINGS

ROOT = Path(__file__).parents[2]
TRIALS = 5


class Times(tune.Callback):
    """Notes when each trial ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_trial_complete(self, **info: Any) -> None:
        self.ends.append(time.perf_counter())


def gaps(inputs: TrialInputs, reuse: bool, folder: str) -> list[float]:
    times, config = (
        Times(),
        {
            "trial": "0001",
            "origin": "search",
            "epochs": 0,
            "plan": {"steps": []},
            "cost_ratio": 1.0,
        },
    )
    tune.run(
        tune.with_parameters(PlanTrial, inputs=inputs),
        config=config,
        num_samples=TRIALS,
        max_concurrent_trials=1,
        resources_per_trial={"cpu": 1},
        reuse_actors=reuse,
        callbacks=[times],
        storage_path=folder,
        name=f"reuse-{reuse}",
        verbose=0,
    )
    return [after - before for before, after in zip(times.ends, times.ends[1:], strict=False)]


def tiny_data(folder: str) -> Sweep:
    """The sample sweep on sixteen images, so that hardly anything but starting is measured."""
    source = ROOT / "search" / "sample" / "val.parquet"
    path = Path(folder) / "few.parquet"
    pq.write_table(pq.read_table(source).slice(0, 16), path)
    sets = [f"data.{split}='{path}'" for split in ("train", "val", "test")]
    sets += [
        "data.batch_size=8",
        "data.calibration=8",
        f"model.path='{ROOT}/search/sample/vit_cifar10.safetensors'",
    ]
    return load_sweep(ROOT / "search" / "sweeps" / "sample.toml", sets)


def main() -> None:
    os.environ |= RAY_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        sweep = tiny_data(folder)
        dense, _ = check(sweep)
        inputs = TrialInputs(sweep=sweep, dense=dense, start=dense)
        fresh, reused = (statistics.median(gaps(inputs, r, folder)) for r in (False, True))
    print(f"seconds from one trial's end to the next's, median of {TRIALS - 1}:")
    print(f"  an actor for each trial  {fresh:6.2f}")
    print(f"  one actor, reused        {reused:6.2f}   ({fresh / reused:.1f} times less)")


if __name__ == "__main__":
    main()
