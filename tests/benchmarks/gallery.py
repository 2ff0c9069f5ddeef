"""The pictures of docs/review.md: a sweep of three families on CIFAR-10, and what it comes to.

    python tests/benchmarks/gallery.py --train cifar10/train.parquet --test cifar10/test.parquet

The two files are those of CIFAR-10 in Hugging Face's image schema. The first `--images` of the
training split are trained on; the test split is halved into validation and test. X-Pruner learns
masks of heads and neurons for each class, ToMe merges patches, and the smallest weights go. The
sweep is left in `--storage`, the pictures in `--out`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyarrow.parquet as pq

from search.__main__ import main as search

ROOT = Path(__file__).parents[2]
NAME = "cifar10"
STEPS = '[{method="x_pruner"}, {method="tome"}, {method="magnitude"}]'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--storage", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    args = parser.parse_args()
    train, test, out = args.train.resolve(), args.test.resolve(), args.out.resolve()
    storage = args.storage.resolve()
    os.chdir(ROOT)  # the sweep's paths begin here
    data = {key: storage / "cifar10-images" / f"{key}.parquet" for key in ("train", "val", "test")}
    storage.joinpath("cifar10-images").mkdir(parents=True, exist_ok=True)
    whole = pq.read_table(test)
    half = len(whole) // 2
    for key, table in (
        ("train", pq.read_table(train).slice(0, args.images)),
        ("val", whole.slice(0, half)),
        ("test", whole.slice(half)),
    ):
        pq.write_table(table, data[key], row_group_size=1_000)
    sets = [f'name="{NAME}"', f'storage="{storage}"', f"steps={STEPS}", f"trials={args.trials}"]
    sets += [f'data.{key}="{path}"' for key, path in data.items()]
    search(["run", "search/sweeps/sample.toml", "--set", *sets])
    page = str(storage / NAME / "report.html")
    search(["report", str(storage / NAME), "--out", page, "--pictures", str(out)])


if __name__ == "__main__":
    main()
