"""Checks of a sweep before anything expensive: its model, its methods, its labels."""

from __future__ import annotations

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pruners import PrunableViT
from pruners.model.rotation import check_turns
from search.data.model import load_model
from search.data.shards import Shards, find_shards, naming
from search.space.build import build_space
from search.space.space import Space
from search.sweep.spec import Sweep, SweepError


def check(sweep: Sweep) -> tuple[PrunableViT, Space]:
    """Build the dense model and the space of a sweep, and check that its labels fit the head.

    Raises:
        SweepError: For the first thing that is wrong.
    """
    dense = load_model(sweep.model)
    if sweep.model.rotate:
        try:
            check_turns(dense)
        except ValueError as error:
            raise SweepError(f"model.rotate: {error}; or give rotate = false") from error
    space = build_space(sweep, dense.shape())
    for split in ("train", "val", "test"):
        _check_labels(sweep, split, dense.vit.num_classes)
    return dense, space


def _check_labels(sweep: Sweep, split: str, classes: int) -> None:
    data, key = sweep.data, f"data.{split}"
    try:
        shards = find_shards(getattr(data, split), data.image_column, data.label_column)
        low, high = label_range(shards)
    except (ValueError, FileNotFoundError) as error:
        raise SweepError(f"{key}: {error}") from error
    if low < 0:
        raise SweepError(f"{key} has the label {low}; give labels from 0 to {classes - 1}")
    named = len(shards.classes)
    found = named or high + 1
    if found > classes or (named and named != classes):
        raise SweepError(
            f"{key} has {found} classes and the model's head has {classes}; "
            "give data and weights of the same classes"
        )


def label_range(shards: Shards) -> tuple[int, int]:
    """Return the lowest and the highest label.

    The row groups' statistics would say it sooner, but where they are damaged, reading them ends
    the process.

    Raises:
        ValueError: If labels are absent, or a file is damaged.
    """
    lows, highs = [], []
    for path in shards.paths:
        with naming(path), shards.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=True)
            labels = file.read(columns=[shards.label_column]).column(0)
        if labels.null_count:
            raise ValueError(
                f"{path}: {shards.label_column} is empty in {labels.null_count} rows; "
                "give each image a label"
            )
        if len(labels):
            low, high = (pc.min_max(labels)[end].as_py() for end in ("min", "max"))
            lows.append(low)
            highs.append(high)
    return min(lows), max(highs)
