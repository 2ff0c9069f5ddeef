"""Fronts found with the same training epochs: this engine, and what one would set up instead.

    python tests/benchmarks/search_quality.py --epochs 48 --seeds 0 1 --jobs 2

The sample's ViT, units and tokens cut, MACs of dense kernels between 0.25 and 0.97 of the dense
model's; every trial is tuned for two epochs by the same recipe on the same images. Arms are

    uniform                       a ladder of budgets, the same share everywhere
    random, optuna, nsga2         Ray Tune over the raw share of every site (`rivals.py`)
    tp_magnitude, tp_taylor       Torch-Pruning's global pruning of units, a ladder of budgets
    engine                        a sweep with its defaults; engine_*: variants (`engine_arm.py`)
    own, curvature, curvature_tome     no search either (`quality_ladders.py`)

The first two lines and Torch-Pruning's are the rivals of the goal that the report states. What has
ended is kept below --out and not run again, so an interrupted run continues with the same command;
--report prints what is there. Without --train and --test the repository's own sample is used; the
images of --test are halved into validation and test. Needs `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import glob
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import ray
from anytime import volume, within
from engine_arm import VARIANTS, engine_trials, run_engine, scoring_s
from journal import Journal, read_only
from quality_ladders import curvature, own, run_ladder, uniform
from quality_problem import SAMPLE, TUNE_EPOCHS, Bench, Settings, SettingsError
from quality_report import Arms, draw, table
from rivals import search_optuna, search_random

from search.sweep.spec import Sweep

RIVALS = ["uniform", "random", "optuna", "nsga2", "tp_magnitude", "tp_taylor"]
LADDERS = ["own", "curvature", "curvature_tome"]
ARMS = [*RIVALS, *VARIANTS, *LADDERS]


def run_arm(settings: Settings, arm: str, seed: int) -> None:
    """Run an arm of a seed, or what is left of it, in a process of its own."""
    sweep = settings.sweep(f"{arm}-{seed}", seed)
    journal, count = journal_path(settings, arm, seed), settings.trials
    if sum(trial.epochs for trial in read_only(journal)) > settings.epochs - TUNE_EPOCHS:
        return
    searches: dict[str, Callable[[Sweep, Path, int], None]] = {
        "random": search_random,
        "optuna": partial(search_optuna, nsga2=False),
        "nsga2": partial(search_optuna, nsga2=True),
    }
    if arm in VARIANTS or arm in searches:
        connect()
        if arm in VARIANTS:
            run_engine(settings, arm, seed)
        else:
            searches[arm](sweep, journal, settings.epochs)
        ray.shutdown()
        return
    bench = Bench(sweep)
    if arm.startswith("tp_"):
        from torch_pruning_ladder import torch_pruning  # not among what the project needs

        cuts = torch_pruning(bench, count, arm.removeprefix("tp_"))
    elif arm == "uniform":
        cuts = uniform(bench, count)
    elif arm == "own":
        cuts = own(bench, count)
    else:
        cuts = curvature(bench, count, tome=arm == "curvature_tome")
    run_ladder(bench, Journal(journal), cuts)


def connect() -> None:
    """Start a Ray of this process's own, with room for one trial."""
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def journal_path(settings: Settings, arm: str, seed: int) -> Path:
    return settings.folder / f"{arm}-{seed}.jsonl"


def collect(settings: Settings, arms: list[str], seeds: list[int]) -> Arms:
    """Return what has ended, of arms and seeds of which something has."""
    found: Arms = {}
    for arm in arms:
        runs = [
            engine_trials(settings, arm, seed)
            if arm in VARIANTS
            else read_only(journal_path(settings, arm, seed))
            for seed in seeds
        ]
        if any(runs):
            found[arm] = [run for run in runs if run]
    return found


def run_all(settings: Settings, arms: list[str], seeds: list[int], jobs: int) -> list[str]:
    """Run all arms and return what went wrong, a line each."""
    start, wrong = time.perf_counter(), []
    pending: dict[Future[None], tuple[str, int]] = {}
    # Each arm gets a fresh process, and so a Ray of its own.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in seeds:
            for arm in arms:
                pending[pool.submit(run_arm, settings, arm, seed)] = (arm, seed)
        try:
            for future in as_completed(pending):
                arm, seed = pending[future]
                if error := future.exception():
                    line = f"{arm}, seed {seed}: {type(error).__name__}: {error}"
                    wrong.append(line)
                else:
                    (run,) = collect(settings, [arm], [seed])[arm]
                    used = within(run, settings.epochs)
                    line = f"{arm}, seed {seed}: {len(used)} trials, {volume(used, 0.0):.4f}"
                print(f"{time.perf_counter() - start:6.0f} s  {line}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            wrong.append("interrupted; the same command continues")
    return wrong


def settings_of(args: argparse.Namespace) -> Settings:
    """Check what was given.

    Raises:
        SettingsError: In one line.
    """
    if unknown := sorted(set(args.arms) - set(ARMS)):
        raise SettingsError(f"--arms has {unknown[0]!r}; give some of {', '.join(ARMS)}")
    if args.epochs < 3 * TUNE_EPOCHS:
        raise SettingsError(f"--epochs is {args.epochs}; give at least {3 * TUNE_EPOCHS}")
    for source in filter(None, (args.train, args.test)):
        if not (glob.glob(source) or Path(source).exists()):
            raise SettingsError(f"{source} does not exist; give Parquet files or a glob of them")
    return Settings(
        train=str(Path(args.train).absolute()),
        test=str(Path(args.test).absolute()) if args.test else "",
        images=args.images,
        epochs=args.epochs,
        out=str(Path(args.out).absolute()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=48, help="training epochs of each arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM")
    parser.add_argument("--images", type=int, default=2_000, help="training images of an epoch")
    parser.add_argument("--train", default=str(SAMPLE / "train.parquet"), help="or a glob")
    parser.add_argument("--test", help="Parquet files of CIFAR-10's test split, or a glob")
    parser.add_argument("--jobs", type=int, default=2, help="arms at once, of one thread each")
    parser.add_argument("--out", default="results/benchmarks", help="folder of all that is written")
    parser.add_argument("--report", action="store_true", help="of what is there; run nothing")
    args = parser.parse_args()
    try:
        settings = settings_of(args)
        settings.write_images()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = [] if args.report else run_all(settings, args.arms, args.seeds, args.jobs)
    arms = collect(settings, args.arms, args.seeds)
    if arms:
        out = Path(settings.out)
        text = table(arms, settings.epochs, RIVALS)
        scored = f"The engine's methods scored the dense model in {scoring_s(settings):.0f} s."
        (out / "search_quality.md").write_text(f"{text} {scored}\n")
        draw(arms, settings.epochs, out / "search_quality.png")
        print(f"\n{text} {scored}\n\n{out}/search_quality.md and .png")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
