"""Samplers, spaces and halving on a surrogate of training: hypervolume over epochs, many seeds.

    python tests/benchmarks/search_quality_simulated.py --trials 500 --seeds 10 --jobs 2

The surrogate (`surrogate.py`) is fitted to real trials of the sample's ViT with `grouped` and
`tome`, cost in MACs of dense kernels. Writes a table and a picture to --out; what is done is kept
in a file there, and not simulated again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import optuna
import torch
from engine_arm import trials_for
from optuna.samplers import NSGAIISampler
from quality_problem import HIGH, LOW, TUNE_EPOCHS
from surrogate import Surrogate, errors
from tuning import SAMPLE, SPEC, dense_model

from pruners import Plan, Step, cost_of, load_method
from search.data.images import open_images
from search.records import pareto
from search.records.events import METRICS, EpochResult
from search.space.allocation import own_allocation
from search.space.build import build_space
from search.space.space import Space
from search.space.step import Rung
from search.strategy.moasha import NEVER_STOPPED, MoAsha
from search.strategy.proposer import Proposer
from search.sweep.spec import Sweep, SweepFailedError
from search.sweep.toml import load_sweep

matplotlib.use("Agg")
SWEEP = SAMPLE.parent / "sweeps" / "sample.toml"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to search.

    Attributes:
        space: Of this engine's steps; empty for raw shares without projection.
        settings: Overrides of the sweep.
        population: Of NSGA-II, where it is not this engine's.
        told: What the sampler is told of a stopped trial: the top-1 that it had "reached", what it
            would have come to ("extrapolated"), or "nothing".
        most: Trials at most, where a sampler is too slow for more.
    """

    space: str = "residual"
    settings: dict[str, str] = field(default_factory=dict)
    population: int | None = None
    told: str = "reached"
    most: int = 1_000_000


def arm(sampler: str, space: str = "residual", refine: float = 0.0, **more: str | int) -> Arm:
    limits = {key: int(more.pop(key)) for key in ("most", "population") if key in more}
    told = str(more.pop("told", "reached"))
    settings = {"sampler": f'"{sampler}"', "refine": str(refine)}
    return Arm(
        space=space, settings=settings | {k: str(v) for k, v in more.items()}, told=told, **limits
    )


FROM_0, FROM_1 = "{first=0, eta=3.0}", "{first=1, eta=3.0}"
ARMS = {
    "uniform ladder": Arm(space="ladder"),
    "own allocations": Arm(space="own"),
    "raw random": arm("random", space="", ladder=0, alone=0),
    "raw TPE": arm("tpe", space="", ladder=0, alone=0),
    "raw NSGA-II 20": arm("nsga2", space="", ladder=0, alone=0),
    "layer TPE": arm("tpe", space="layer"),
    "tied TPE": arm("tpe", space="tied"),
    "random": arm("random"),
    "TPE": arm("tpe"),
    "NSGA-II 20": arm("nsga2"),
    "NSGA-II 50": arm("nsga2", population=50),
    "NSGA-III 20": arm("nsga3"),
    "GP": arm("gp", most=200),
    "TPE, ladder 5": arm("tpe", ladder=5),
    "TPE, ladder 17": arm("tpe", ladder=17),
    "TPE, refined 0.3": arm("tpe", refine=0.3),
    "TPE, refined 0.6": arm("tpe", refine=0.6),
    "halving from 0: the sample's sweep": arm("tpe", refine=0.3, halving=FROM_0),
    "halving from 0, random": arm("random", refine=0.3, halving=FROM_0),
    "halving from 0, NSGA-II 20": arm("nsga2", refine=0.3, halving=FROM_0),
    "halving from 0, told nothing": arm("tpe", refine=0.3, halving=FROM_0, told="nothing"),
    "halving from 0, told extrapolated": arm(
        "tpe", refine=0.3, halving=FROM_0, told="extrapolated"
    ),
    "halving from 0 by 2": arm("tpe", refine=0.3, halving="{first=0, eta=2.0}"),
    "halving from 0 by 4": arm("tpe", refine=0.3, halving="{first=0, eta=4.0}"),
    "halving from 1": arm("tpe", refine=0.3, halving=FROM_1),
}


@lru_cache
def known() -> tuple[Surrogate, dict[str, dict[str, torch.Tensor]]]:
    """The surrogate, and the methods' scores of the dense model."""
    torch.set_num_threads(1)
    images = open_images(str(SAMPLE / "train.parquet"), SPEC)
    batches = [b for _, b in zip(range(8), images.batches(64, seed=0, augment=False), strict=False)]
    return Surrogate.fit(), {"grouped": load_method("grouped").score(dense_model(), batches)}


def sweep_of(arm: Arm, trials: int, seed: int) -> Sweep:
    kind = arm.space or "layer"
    kind = kind if kind in ("residual", "layer", "tied") else "residual"
    steps = ", ".join(f'{{method="{m}", space="{kind}"}}' for m in ("grouped", "tome"))
    settings = {"ladder": "9", "halving": "false", "epochs": str(TUNE_EPOCHS)} | arm.settings
    sets = [f"{key}={value}" for key, value in settings.items()]
    sets += [f"steps=[{steps}]", 'cost="gmacs"', f"budget=[{LOW}, {HIGH}]"]
    return load_sweep(SWEEP, [*sets, f"trials={trials + 1}", f"seed={seed}"])


def space_of(sweep: Sweep) -> Space:
    shape, (_, scores) = dense_model().shape(), known()
    rungs = {}
    for label, spec in zip(sweep.labels, sweep.steps, strict=True):
        method = load_method(spec.method)
        own = own_allocation(method, shape, scores.get(label, {}), spec.max_share)
        rungs[label] = [Rung(pruner=method, own=own)]
    return build_space(sweep, shape).measured(rungs)


class Trial(NamedTuple):
    """What came of a trial.

    Attributes:
        epochs: Epochs spent.
        cost: Cost ratio.
        top1: Percent; NaN if it was stopped.
        proposing_s: Seconds until its plan was known.
    """

    epochs: int
    cost: float
    top1: float
    proposing_s: float = 0.0


def simulate(name: str, seed: int, trials: int) -> list[Trial]:
    """Search with one arm and seed."""
    arm = ARMS[name]
    trials = min(trials, arm.most)
    trials = trials_for(sweep_of(arm, trials, seed), TUNE_EPOCHS * trials)
    sweep = sweep_of(arm, trials, seed)
    space = space_of(sweep)
    if arm.space in ("ladder", "own"):
        return list(ladder(space, trials, seed, uniform=arm.space == "ladder"))
    proposer = Proposer(sweep=sweep, space=space)
    if arm.population is not None:
        proposer.study.sampler = NSGAIISampler(seed=seed, population_size=arm.population)
    if arm.space == "":
        return list(raw(proposer, trials, seed))
    return list(engine(proposer, trials, seed, arm.told))


def engine(proposer: Proposer, trials: int, seed: int, told: str) -> Iterator[Trial]:
    """This engine: its proposer, and its halving where the sweep has one."""
    surrogate, rng = known()[0], np.random.default_rng(1_000 + seed)
    settings, halving = proposer.sweep.halving, None
    if settings is not None:
        halving = MoAsha(epochs=TUNE_EPOCHS, **settings.model_dump())
    ended: list[tuple[float, np.ndarray]] = []  # cost and curve
    for position in range(1, trials + 1):
        label = f"{position:04d}"
        start = time.perf_counter()
        try:
            origin, proposal = proposer.ask(label, position)
        except SweepFailedError:  # nothing is left to try
            return
        seconds = time.perf_counter() - start
        cost, curve = proposal.cost_ratio, surrogate.curve(proposal.plan, rng)
        spent = TUNE_EPOCHS
        if halving is not None:
            spent = stopped_after(halving, label, origin, cost, curve)
        if spent == TUNE_EPOCHS:
            ended.append((cost, curve))
            proposer.tell(label, float(curve[-1]), cost)
        elif told == "nothing":
            proposer.fail(label)
        else:
            top1 = curve[spent] if told == "reached" else extrapolated(ended, cost, spent, curve)
            proposer.tell(label, float(top1), cost, stopped=True)
        yield Trial(spent, cost, float(curve[-1]) if spent == TUNE_EPOCHS else math.nan, seconds)


def extrapolated(
    ended: list[tuple[float, np.ndarray]], cost: float, epoch: int, curve: np.ndarray
) -> float:
    """Return what a trial would have come to: a least-squares fit to those that have ended.

    Last top-1 is a linear function of log cost and top-1 after that epoch.
    """
    costs, curves = np.array([c for c, _ in ended]), np.array([c for _, c in ended])
    x = np.column_stack([np.ones(len(ended)), np.log(costs), curves[:, epoch]])
    weights, *_ = np.linalg.lstsq(x, curves[:, -1], rcond=None)
    return float(weights @ [1.0, math.log(cost), curve[epoch]])


def stopped_after(halving: MoAsha, label: str, origin: str, cost: float, curve: np.ndarray) -> int:
    """Return the epochs that a trial runs."""
    if origin in NEVER_STOPPED:
        return TUNE_EPOCHS
    for epoch in range(TUNE_EPOCHS):
        metrics = dict.fromkeys(METRICS, 1.0) | {"cost_ratio": cost, "val_top1": curve[epoch]}
        reached = {"trial": label, "epoch": epoch, "status": "running"}
        rest = {"reason": "", "shape": "{}", "by_class": []}
        if not halving.continues(EpochResult.from_json({**metrics, **reached, **rest})):
            return epoch
    return TUNE_EPOCHS


def raw(proposer: Proposer, trials: int, seed: int) -> Iterator[Trial]:
    """Shares of all sites as they are sampled; plans out of range are told, but cost no epochs."""
    surrogate, rng = known()[0], np.random.default_rng(1_000 + seed)
    study, space = proposer.study, proposer.space
    done = tried = 0
    start = time.perf_counter()
    while done < trials and tried < 20 * trials:
        tried += 1
        trial = study.ask()
        steps = []
        for method in ("grouped", "tome"):
            pruner = load_method(method)
            most = 0.5 if method == "tome" else 0.9
            shares = {s: trial.suggest_float(s, 0.0, most) for s in pruner.sites(space.dense)}
            steps.append(Step(pruner=pruner, thresholds=shares))
        plan = Plan(steps=tuple(steps))
        cost = cost_of(plan.shape(space.dense)).macs / space.dense_cost
        if not LOW <= cost <= HIGH:
            # A plan that is too small is as bad as chance; a dear one gains nothing.
            study.tell(trial, [10.0, max(cost, HIGH)])
            continue
        seconds = time.perf_counter() - start
        top1 = float(surrogate.curve(plan, rng)[-1])
        study.tell(trial, [top1, cost])
        done += 1
        yield Trial(TUNE_EPOCHS, cost, top1, seconds)
        start = time.perf_counter()


def ladder(space: Space, trials: int, seed: int, *, uniform: bool) -> Iterator[Trial]:
    """Plans without any search, coarse budgets first: one share everywhere, or own allocations."""
    surrogate, rng = known()[0], np.random.default_rng(1_000 + seed)
    order = [0.0, 1.0, *(p / 2**k for k in range(1, 12) for p in range(1, 2**k, 2))]
    for place in order[:trials]:
        budget = LOW + place * (HIGH - LOW)
        parameters = {"budget": budget}
        for step in space.steps:
            parameters |= step.neutral(space.dense)
        if uniform:
            plan, cost = uniform_plan(space, budget)
        else:
            proposal = space.propose(parameters)
            plan, cost = proposal.plan, proposal.cost_ratio
        yield Trial(TUNE_EPOCHS, cost, float(surrogate.curve(plan, rng)[-1]))


def uniform_plan(space: Space, budget: float) -> tuple[Plan, float]:
    low, high, plan, cost = 0.0, 0.5, Plan(), 1.0
    for _ in range(25):
        share = (low + high) / 2
        plan = Plan(
            steps=tuple(
                Step(pruner=p, thresholds=dict.fromkeys(p.sites(space.dense), share))
                for p in (load_method("grouped"), load_method("tome"))
            )
        )
        cost = cost_of(plan.shape(space.dense)).macs / space.dense_cost
        low, high = (low, share) if cost <= budget else (share, high)
    return plan, cost


def volumes(trials: list[Trial], epochs: int, reference: float) -> np.ndarray:
    """Return the hypervolume [epochs + 1] of what had ended after so many epochs."""
    found = np.zeros(epochs + 1)
    spent, points = 0, []
    best = 0.0
    for trial in trials:
        spent += trial.epochs
        if np.isfinite(trial.top1):
            points.append((trial.cost, trial.top1 / 100.0))
            best = pareto.hypervolume(
                *zip(*points, strict=True), reference_cost=1.0, reference_accuracy=reference
            )
        if spent <= epochs:
            found[spent:] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / f"search_quality_simulated-{args.trials}.jsonl"
    done: dict[tuple[str, int], list[Trial]] = {}
    if kept.exists():
        rows = map(json.loads, kept.read_text().splitlines())
        done = {tuple(row["key"]): [Trial(*t) for t in row["trials"]] for row in rows}
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.arms]
    with ProcessPoolExecutor(args.jobs) as pool, kept.open("a") as file:
        start = time.time()
        pending = {
            pool.submit(simulate, *key, args.trials): key for key in wanted if key not in done
        }
        for task in as_completed(pending):
            key, trials = pending[task], task.result()
            done[key] = trials
            file.write(json.dumps({"key": key, "trials": trials}) + "\n")
            file.flush()
            print(f"{time.time() - start:.0f} s: {', seed '.join(map(str, key))}", flush=True)
    report(args, {key: done[key] for key in wanted})


def report(args: argparse.Namespace, done: dict[tuple[str, int], list[Trial]]) -> None:
    from matplotlib import pyplot

    epochs = TUNE_EPOCHS * args.trials
    marks = [m for m in (16, 32, 48, 100, 200, 400, 1000) if m <= epochs]
    lines = [
        "surrogate: "
        + "; ".join(
            f"after epoch {e} rmse {rmse:.2f}, rank correlation {rho:.2f}"
            for e, (rmse, rho) in enumerate(errors())
        )
    ]
    lines += [
        "",
        "| arm | seeds | proposing: median, p95 | "
        + " | ".join(f"{m} epochs" for m in marks)
        + " |",
    ]
    lines.append("|---" * (3 + len(marks)) + "|")
    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=120, layout="constrained")
    for name in args.arms:
        runs = [r for (arm, _), r in done.items() if arm == name]
        curves = np.array([volumes(run, epochs, 0.5) for run in runs])
        mean = curves.mean(axis=0)
        error = curves.std(axis=0, ddof=min(1, len(runs) - 1)) / np.sqrt(len(runs))
        spent = int(np.mean([sum(trial.epochs for trial in run) for run in runs]))
        seconds = [trial.proposing_s for run in runs for trial in run]
        proposing = "{:.2f} s, {:.2f} s".format(*np.quantile(seconds, [0.5, 0.95]))
        cells = [f"{mean[m]:.4f} ± {error[m]:.4f}" if m <= spent else "" for m in marks]
        lines.append(f"| {name} | {len(runs)} | {proposing} | " + " | ".join(cells) + " |")
        x = np.arange(2, min(spent, epochs) + 1)
        (line,) = axes.plot(x, mean[x], label=name)
        axes.fill_between(
            x, (mean - error)[x], (mean + error)[x], color=line.get_color(), alpha=0.2
        )
    axes.set(
        xscale="log", xlabel="epochs of fine-tuning", ylabel="hypervolume above 50 % and below 1.0x"
    )
    axes.set_ylim(bottom=0.12)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.out / "search_quality_simulated.png")
    text = "\n".join(lines) + "\n"
    (args.out / "search_quality_simulated.md").write_text(text)
    print(text)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    main()
