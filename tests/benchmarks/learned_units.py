"""Unit pruning of the sample's ViT at half its MACs, fine-tuned the same way, by every method.

    python tests/benchmarks/learned_units.py

Validation and test top-1 in percent, mean and largest deviation over the seeds; seconds of learning
beside it, and the share of the dense MACs that is left, as dense kernels run them. What methods
have learned is cut with what stays solved anew, and without. Every method decides its own
layer-wise shares for the budget; "uniform" and "random" give every site the same. Without --train
and --test the repository's own sample is used; the images of --test are halved into validation and
test.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor
from tuning import BATCH, Tuned, Tuning, arguments, cell, dense_model, in_batches, tune, tuning_of

from pruners import Plan, PrunableViT, Step, ViTShape, cost_of, load_method
from pruners.families.allocation import same_share
from pruners.families.learned import LearnedPruner
from pruners.families.unit import UnitPruner
from pruners.model.types import Scores, Thresholds
from pruners.training.learner import LearningData

BASELINES = ("uniform", "random", "grouped magnitude", "grouped taylor")
LEARNED: dict[str, tuple[str, dict[str, object]]] = {
    "x_pruner": ("x_pruner", {}),
    "x_pruner, global": ("x_pruner", {"thresholds": "global"}),
    "wdpruning": ("wdpruning", {}),
    "uvc": ("uvc", {}),
    "vit_slim": ("vit_slim", {}),
    "cait_channels": ("cait_channels", {}),
}
SOLVED = ", solved"
"""Behind the name of a row whose weights that stay were solved anew."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    tuning: Tuning
    budget: float
    learn_epochs: int
    both: bool
    options: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Cut:
    name: str
    vit: PrunableViT
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    seed: int
    tuned: Tuned
    macs: float
    learning_s: float


def within(
    budget: float, shape: ViTShape, allocate: Callable[[float], Thresholds], method: UnitPruner
) -> Thresholds:
    """Thresholds whose dense kernels run within the budget: padding counts."""
    dense = cost_of(shape).macs
    wanted = budget * dense
    while True:
        shares = allocate(wanted)
        over = cost_of(method.shrink(shape, shares)).macs - budget * dense
        if over <= 0:
            return shares
        wanted -= max(over, 0.002 * dense)


def learned_cuts(name: str, seed: int, settings: Settings, dense: PrunableViT) -> Iterator[Cut]:
    """Learn once; cut the weights that were trained along, then the dense model's own."""
    tuning = settings.tuning
    train, (val, _) = tuning.training_images(), tuning.evaluation_images()
    method_name, options = LEARNED[name]
    method = load_method(method_name, **({"seed": seed} | options))
    assert isinstance(method, LearnedPruner)
    method = dataclasses.replace(method.for_budget(settings.budget), epochs=settings.learn_epochs)
    method = dataclasses.replace(method, **settings.options)
    data = LearningData(
        train=lambda e: tuning.epoch(train, 1_000 * seed + e),
        val=lambda: in_batches(*val),
        steps=tuning.steps,
    )
    learned, shape = method.learn(dense, data), dense.shape()
    print(f"  {name}, seed {seed}: {dict(learned.report)}", flush=True)
    shares = within(
        settings.budget, shape, lambda m: method.allocate(shape, learned.scores, m), method
    )
    ways = {name: learned}
    if learned.weights and settings.both:
        ways[f"{name}, dense weights"] = dataclasses.replace(learned, weights={})
    calibration = calibration_images(seed, settings)
    for (way, known), solved in itertools.product(ways.items(), (False, True)):
        vit = copy.deepcopy(dense)
        pruner = dataclasses.replace(method, compensate=solved)
        plan = Plan(steps=(Step(pruner=pruner, thresholds=shares),))
        plan.apply(vit, calibration, known)
        seconds = learned.report["seconds"]
        yield Cut(name=way + SOLVED * solved, vit=vit, seconds=seconds)


def calibration_images(seed: int, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    train = settings.tuning.training_images()
    return list(itertools.islice(train.batches(BATCH, seed=seed, augment=False), 8))


def baseline_cut(name: str, seed: int, settings: Settings, dense: PrunableViT) -> Cut:
    """Cut by magnitude or Taylor scores, or at random."""
    shape, calibration = dense.shape(), calibration_images(seed, settings)
    criterion = name.removeprefix("grouped ") if name.startswith("grouped") else "magnitude"
    grouped = load_method("grouped", criterion=criterion)
    assert isinstance(grouped, UnitPruner)
    scores: Scores = grouped.score(dense, calibration)
    macs = settings.budget * cost_of(shape).macs
    if name.startswith("grouped"):
        shares = grouped.allocate(shape, scores, macs)
    else:
        sites = list(grouped.sites(shape))
        shares = same_share(sites, lambda s: grouped.shrink(shape, s), macs, largest=0.99)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {s: torch.rand(v.shape, generator=generator) for s, v in scores.items()}
    vit = copy.deepcopy(dense)
    grouped.cut(vit, scores, shares)
    return Cut(name=name, vit=vit, seconds=0.0)


def measure(name: str, seed: int, settings: Settings) -> list[Row]:
    torch.set_num_threads(1)
    dense = dense_model()
    if name in LEARNED:
        return [
            row(cut, seed, settings, dense) for cut in learned_cuts(name, seed, settings, dense)
        ]
    return [row(baseline_cut(name, seed, settings, dense), seed, settings, dense)]


def row(cut: Cut, seed: int, settings: Settings, dense: PrunableViT) -> Row:
    return Row(
        name=cut.name,
        seed=seed,
        tuned=tune(cut.vit, dense, seed, settings.tuning),
        macs=cost_of(cut.vit.shape()).macs / cost_of(dense.shape()).macs,
        learning_s=cut.seconds,
    )


def order(name: str) -> tuple[int, str]:
    first = name.removesuffix(SOLVED).removesuffix(", dense weights")
    return [*BASELINES, *LEARNED].index(first), name


def table(rows: list[Row]) -> None:
    print("\n| method | validation | test | before fine-tuning | MACs | learning, s |")
    print("|---|---|---|---|---|---|")
    for name in sorted({row.name for row in rows}, key=order):
        of = [row for row in rows if row.name == name]
        macs = statistics.fmean(row.macs for row in of)
        seconds = statistics.fmean(row.learning_s for row in of)
        print(
            f"| {name} | {cell([r.tuned.val for r in of])} | {cell([r.tuned.test for r in of])} | "
            f"{cell([r.tuned.untuned for r in of])} | {macs:.3f}x | {seconds:.0f} |"
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, *LEARNED])
    parser.add_argument("--kept-only", action="store_true", help="no rows of dense weights")
    parser.add_argument("--set", nargs="*", default=[], help="options of the methods, KEY=NUMBER")
    args = parser.parse_args()
    settings = Settings(
        tuning=tuning_of(args),
        budget=args.budget,
        learn_epochs=args.learn_epochs,
        both=not args.kept_only,
        options={k: float(v) for k, v in (pair.split("=") for pair in args.set)},
    )
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(measure, name, seed, settings)
            for name in args.methods
            for seed in args.seeds
        ]
        for future in as_completed(pending):
            rows += future.result()
            print(f"{time.perf_counter() - start:6.0f} s  {future.result()}", flush=True)
    table(rows)


if __name__ == "__main__":
    main()
