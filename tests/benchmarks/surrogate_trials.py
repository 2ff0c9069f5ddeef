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

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from quality_problem import HIGH, ROOT, SAMPLE, TUNE_EPOCHS, Settings
from surrogate import BLOCKS, KINDS, TRIALS

from search.check import check
from search.records.files import read_trials
from search.records.trial_record import TrialRecord
from search.sweep.spec import Sweep
from search.tuner import RAY_SETTINGS, is_done, run_sweep

SPACES = ("residual", "layer", "tied")
LEAST = 0.2
"""Cost below that of any plan that the surrogate will be asked for."""


def sweep_of(settings: Settings, space: str) -> Sweep:
    """Return the sweep of a kind of space."""
    steps = ", ".join(f"{{method='{method}', space='{space}'}}" for method in ("grouped", "tome"))
    return settings.sweep(
        space,
        0,
        f"steps=[{steps}]",
        f"budget=[{LEAST}, {HIGH}]",
        "sampler='random'",
        "refine=0.0",
        "concurrency=2",
    )


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
    out = Path(args.out).resolve()
    os.chdir(ROOT)  # the sweep's paths begin here
    os.environ |= RAY_SETTINGS
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    settings = Settings(
        train=str(SAMPLE / "train.parquet"),
        test="",
        images=args.images,
        epochs=TUNE_EPOCHS * args.trials,
        out=str(out / "surrogate_trials"),
    )
    settings.write_images()
    rows = []
    for space in SPACES:
        sweep = sweep_of(settings, space)
        if not is_done(sweep):
            run_sweep(sweep, check(sweep)[0], sys.stdout)
        records = read_trials(sweep.directory / "trials.parquet")
        rows += [row_of(space, r) for r in records if r.status == "finished"]
    pq.write_table(pa.Table.from_pylist(rows), TRIALS)
    print(f"{len(rows)} trials in {TRIALS}")


if __name__ == "__main__":
    main()
