"""Trains the plans that the surrogate of `search_quality_simulated.py` is fitted to.

    python tests/benchmarks/surrogate_trials.py --trials 60 --images 2000

One sweep with a random sampler for each kind of space, so that plans come from everywhere and not
from where one sampler goes. Sweeps lie below --out and are continued if interrupted; all of them
together are written to data/trials.parquet: shares of every site, and top-1 after each epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from surrogate import BLOCKS, EPOCHS, KINDS, TRIALS

from search.check import check
from search.results import TrialRecord, read_trials
from search.sweep import Sweep
from search.sweep_file import load_sweep
from search.tuner import RAY_SETTINGS, is_done, run_sweep

ROOT = Path(__file__).parents[2]
SPACES = ("residual", "layer", "tied")
LOW, HIGH = 0.2, 0.97


def sweep_of(space: str, args: argparse.Namespace) -> Sweep:
    out = Path(args.out).absolute() / "surrogate_trials"
    out.mkdir(parents=True, exist_ok=True)
    train = out / "train.parquet"
    if not train.exists():
        table = pq.read_table(ROOT / "search" / "sample" / "train.parquet")
        rows = np.random.default_rng(0).permutation(table.num_rows)[: args.images]
        pq.write_table(table.take(np.sort(rows)), train)
    steps = ", ".join(f"{{method='{method}', space='{space}'}}" for method in ("grouped", "tome"))
    sets = [
        f"name='{space}'",
        f"storage='{out}'",
        f"data.train='{train}'",
        f"steps=[{steps}]",
        "cost='gmacs'",
        f"budget=[{LOW}, {HIGH}]",
        "sampler='random'",
        "refine=0.0",
        f"trials={args.trials + 1}",
        f"epochs={EPOCHS}",
        "finetune.lr=2e-4",
    ]
    return load_sweep(ROOT / "search" / "sweeps" / "sample.toml", sets)


def row_of(space: str, record: TrialRecord) -> dict[str, object]:
    """Return a trial's shares, 0 where a site is left alone, and its accuracies."""
    shares = {site: s for step in record.plan["steps"] for site, s in step["thresholds"].items()}
    sites = [f"blocks.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS]
    return {
        "space": space,
        "cost_ratio": record.cost_ratio,
        **{site: float(shares.get(site, 0.0)) for site in sites},
        **{f"top1_{epoch['epoch']}": epoch["val_top1"] for epoch in record.history},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60, help="of each space")
    parser.add_argument("--images", type=int, default=2_000, help="training images of an epoch")
    parser.add_argument("--out", default="results/benchmarks", help="folder of the sweeps")
    args = parser.parse_args()
    os.chdir(ROOT)  # the sweep's paths begin here
    os.environ |= RAY_SETTINGS
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows = []
    for space in SPACES:
        sweep = sweep_of(space, args)
        if not is_done(sweep):
            run_sweep(sweep, *check(sweep), sys.stdout)
        records = read_trials(sweep.directory / "trials.parquet")
        rows += [row_of(space, r) for r in records if r.status == "finished"]
    pq.write_table(pa.Table.from_pylist(rows), TRIALS)
    print(f"{len(rows)} trials in {TRIALS}")


if __name__ == "__main__":
    main()
