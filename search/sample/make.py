"""Makes the sample of CIFAR-10 beside this file: `python search/sample/make.py TRAIN TEST [OUT]`.

TRAIN and TEST are the Parquet files of CIFAR-10 in the Hugging Face image schema. Validation and
test images both come from TEST, because the sample's model has seen every image of TRAIN.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def stratified(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Return row numbers, in random order, with `per_class` rows of each class."""
    classes = np.unique(labels)
    picked = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes]
    return rng.permutation(np.concatenate(picked))


def make(train: Path, test: Path, out: Path, *, seed: int = 0, per_class: int = 100) -> None:
    """Write train.parquet (4 x `per_class` per class), val.parquet and test.parquet (1 x each)."""
    rng = np.random.default_rng(seed)
    train_table, test_table = pq.read_table(train), pq.read_table(test)
    rows = stratified(train_table.column("label").to_numpy(), 4 * per_class, rng)
    _write(train_table, rows, out / "train.parquet")
    # Twice as many per class, dealt out in turn class by class: equal in both, and disjoint.
    rows = stratified(test_table.column("label").to_numpy(), 2 * per_class, rng)
    labels = test_table.column("label").to_numpy()[rows]
    order = rows[np.argsort(labels, kind="stable")]
    _write(test_table, rng.permutation(order[0::2]), out / "val.parquet")
    _write(test_table, rng.permutation(order[1::2]), out / "test.parquet")


def _write(table: pa.Table, rows: np.ndarray, path: Path) -> None:
    pq.write_table(table.take(pa.array(rows)).combine_chunks(), path, compression="none")


if __name__ == "__main__":
    train_path, test_path, *rest = map(Path, sys.argv[1:])
    make(train_path, test_path, rest[0] if rest else Path(__file__).parent)
