"""Training epochs per hour of trials, with the dense model's answers shared and with it asked live.

    python tests/benchmarks/trial_throughput.py

The sample sweep's model and images (`search/sweeps/sample.toml`), plans that cut the same share of
units, tokens and weights, one thread per trial. An actor holds a trial of either kind and trains
both in turn, so that they meet the same noise; a row is the median over rounds. Epochs per hour
are those of all actors together. A teacher's cost is given as a share of the processor time of the
training that it is part of, which other processes disturb less than the clock: live it is what an
epoch takes longer; shared it is opening and looking up the answers and, for each trial, its part of
computing them once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.families.allocation import smallest
from search.data.augment import Epoch
from search.data.model import load_model
from search.data.teacher import open_answers
from search.records.events import TrialConfig
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from search.trial.inputs import TrialInputs
from search.trial.trial import Trial
from search.trial.workers import OneWorker

ROOT = Path(__file__).parents[2]
TRIALS = (16, 50)  # that share what is computed once
GOAL = 3.0  # percent
METHODS = ("grouped", "evit", "magnitude")
KINDS = {"live": "asked live", "shared": "shared"}


class Seconds(NamedTuple):
    """What an epoch takes, by the clock and by the processor."""

    wall: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a plan: seconds of an epoch; the teacher's are the processor's."""

    ratio: float
    actors: int
    live: Seconds
    shared: Seconds
    faster: float
    lookup_s: float
    compute_s: float

    def epochs_per_hour(self, kind: str) -> float:
        return 3600.0 * self.actors / getattr(self, kind).wall

    @property
    def own_cpu(self) -> float:
        """Seconds of an epoch without a teacher."""
        return self.shared.cpu - self.lookup_s

    @property
    def teacher_live(self) -> float:
        """The teacher's share of the processor time, in percent."""
        return 100.0 * (1.0 - self.own_cpu / self.live.cpu)

    def teacher_shared(self, trials: int) -> float:
        """The same, of an epoch whose answers so many trials share."""
        cost = self.lookup_s + self.compute_s / trials
        return 100.0 * cost / (self.own_cpu + cost)

    @property
    def trials_for_goal(self) -> int:
        """How many trials must share the answers for the teacher to take less than the goal."""
        left = self.own_cpu * GOAL / (100.0 - GOAL) - self.lookup_s
        return math.floor(self.compute_s / left) + 1 if left > 0.0 else sys.maxsize


def plan_of(dense: PrunableViT, ratio: float) -> Plan:
    """Cut the same share everywhere, the smallest that meets a share of the dense cost."""
    shape = dense.shape()

    def plan(share: float) -> Plan:
        steps: tuple[Step, ...] = ()
        for name in METHODS:
            method = load_method(name)
            sites = method.sites(Plan(steps=steps).shape(shape))
            steps += (Step(pruner=method, thresholds=dict.fromkeys(sites, share)),)
        return Plan(steps=steps)

    budget = ratio * cost_of(shape).effective_macs
    found = smallest(90, lambda n: cost_of(plan(n / 100).shape(shape)).effective_macs <= budget)
    if found is None:
        raise ValueError(f"--plans has {ratio}, which is out of reach; give more")
    return plan(found / 100)


class Actor:
    """A process of a sweep, with a trial of either kind."""

    def __init__(self, inputs: dict[str, TrialInputs]) -> None:
        idle = config_of(Plan())
        self.trials = {k: Trial.first(given, idle, OneWorker()) for k, given in inputs.items()}

    def cut(self, plan: Plan) -> None:
        """Let both begin with a plan."""
        for kind, trial in self.trials.items():
            self.trials[kind] = trial.next(config_of(plan))
            self.trials[kind].step()

    def train(self, kind: str, batches: int) -> Seconds:
        """Train on some batches and return what an epoch takes."""
        trial = self.trials[kind]
        wall, cpu = time.perf_counter(), time.process_time()
        training = trial.training
        training.tuner.train_taught(itertools.islice(training.batches(1), batches))
        scale = steps_of(trial) / batches
        return Seconds((time.perf_counter() - wall) * scale, (time.process_time() - cpu) * scale)

    def teach(self) -> tuple[float, float]:
        """Return the processor's seconds for opening and looking up answers, and computing them."""
        context = self.trials["shared"].context
        teacher, batch = context.teacher, context.sweep.data.batch_size
        epoch = Epoch(time.time_ns() % 2**32, 1)  # nobody has asked for it
        order = np.random.default_rng(0).permutation(len(context.train_images))
        start = time.process_time()
        shape = teacher.answers(epoch).shape
        compute = time.process_time() - start
        start = time.process_time()
        answers = open_answers(teacher.path(epoch), shape)
        assert answers is not None
        for first in range(0, steps_of(self.trials["shared"]) * batch, batch):
            torch.from_numpy(answers[order[first : first + batch]]).float()
        return time.process_time() - start, compute


def config_of(plan: Plan) -> TrialConfig:
    return TrialConfig(
        trial="0001",
        origin="search",
        plan=json.dumps(plan.to_json()),
        learned="",
        parameters={},
        of="",
        seed=0,
        epochs=1,
        cost_ratio=1.0,
    )


def steps_of(trial: Trial) -> int:
    return len(trial.context.train_images) // trial.context.sweep.data.batch_size


def measure(actors: list[Any], plan: Plan, args: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Train a plan on all actors at the same time, both kinds in turn."""
    ray.get([actor.cut.remote(plan) for actor in actors])
    seconds: dict[str, list[Seconds]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind in list(KINDS)[:: -1 if turn % 2 else 1]:  # neither is always first
            taken = ray.get([actor.train.remote(kind, args.batches) for actor in actors])
            if turn > 0:  # the first warms up
                seconds[kind].append(Seconds(*map(statistics.fmean, zip(*taken, strict=True))))
    return seconds


def row_of(
    ratio: float, actors: int, seconds: dict[str, list[Seconds]], teacher: tuple[float, float]
) -> Row:
    medians = {
        kind: Seconds(*map(statistics.median, zip(*taken, strict=True)))
        for kind, taken in seconds.items()
    }
    pairs = zip(seconds["live"], seconds["shared"], strict=True)
    return Row(
        ratio=ratio,
        actors=actors,
        live=medians["live"],
        shared=medians["shared"],
        faster=statistics.median(live.wall / shared.wall for live, shared in pairs),
        lookup_s=teacher[0],
        compute_s=teacher[1],
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| plan | actors | epochs/h, live | epochs/h, shared | faster | teacher live | "
        + "".join(f"shared by {trials} trials | " for trials in TRIALS)
        + f"below {GOAL:g} % from |",
        "|---" * (7 + len(TRIALS)) + "|",
    ]
    lines += [
        f"| {row.ratio:.1f}x | {row.actors} | {row.epochs_per_hour('live'):.0f} | "
        f"{row.epochs_per_hour('shared'):.0f} | {row.faster:.2f}x | {row.teacher_live:.0f} % | "
        + "".join(f"{row.teacher_shared(trials):.1f} % | " for trials in TRIALS)
        + f"{row.trials_for_goal} trials |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw epochs per hour of each plan, a panel per number of actors."""
    counts = sorted({row.actors for row in rows})
    figure = Figure(figsize=(4.0 * len(counts), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, actors in zip(panels, counts, strict=True):
        mine = [row for row in rows if row.actors == actors]
        for (kind, label), color, side in zip(
            KINDS.items(), ("#9aa5b1", "#d1495b"), (-0.2, 0.2), strict=True
        ):
            bars = axes.bar(
                [place + side for place in range(len(mine))],
                [row.epochs_per_hour(kind) for row in mine],
                width=0.38,
                color=color,
                label=f"teacher {label}",
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_xticks(range(len(mine)), [f"{row.ratio:.1f}x" for row in mine])
        axes.set_title(f"{actors} actor{'s' * (actors > 1)}", fontsize=10)
        axes.set_xlabel("cost of the plan, of the dense model's")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training epochs per hour")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def sweep_with(folder: str, teacher_gb: float) -> Sweep:
    sets = [f"data.cache_dir='{folder}'", f"data.teacher_gb={teacher_gb}"]
    return load_sweep(ROOT / "search" / "sweeps" / "sample.toml", sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results/benchmarks", help="folder of table and picture")
    parser.add_argument("--plans", type=float, nargs="+", default=[0.3, 0.5, 0.8])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=20, help="that are timed at a time")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    os.chdir(ROOT)  # the sweep's paths begin here
    ray.init(num_cpus=max(args.actors), include_dashboard=False, logging_level="ERROR")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sweeps = {"live": sweep_with(folder, 0.0), "shared": sweep_with(folder, 8.0)}
        dense = load_model(sweeps["live"].model)
        inputs = {
            kind: TrialInputs(sweep=sweep, dense=dense, start=dense, directory=Path(folder, kind))
            for kind, sweep in sweeps.items()
        }
        actors = [
            ray.remote(Actor).options(num_cpus=1).remote(inputs) for _ in range(max(args.actors))
        ]
        asked = [ray.get(actors[0].teach.remote()) for _ in range(3)]
        lookup_s, compute_s = map(statistics.median, zip(*asked, strict=True))
        for ratio, count in itertools.product(args.plans, args.actors):
            seconds = measure(actors[:count], plan_of(dense, ratio), args)
            rows.append(row_of(ratio, count, seconds, (lookup_s, compute_s)))
            print(table(rows).splitlines()[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "trial_throughput.md").write_text(table(rows) + "\n")
    draw(rows, out / "trial_throughput.png")
    print(f"\n{table(rows)}\n\n{out}/trial_throughput.md and .png")


if __name__ == "__main__":
    main()
