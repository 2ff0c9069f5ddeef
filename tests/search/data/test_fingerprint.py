from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from search.check import check
from search.data.fingerprint import fingerprint
from search.data.splits import open_split
from search.records.ledger import Ledger, refuse_another
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep
from tests.images import labelled, write_images


def identity_of(sweep_file: Path, *sets: str) -> dict[str, str]:
    sweep = load_sweep(sweep_file, sets)
    return fingerprint(sweep, check(sweep)[0])


def test_it_is_of_content_and_of_nothing_else(sweep_file: Path) -> None:
    before = identity_of(sweep_file)
    assert set(before) == {"model", "data.train", "data.val", "data.test"}
    assert len(set(before.values())) == 4
    assert identity_of(sweep_file, "trials=9", "seed=3") == before
    folder = sweep_file.parent
    (folder / "elsewhere").mkdir()
    for name in ("train", "val", "test"):
        shutil.copy(folder / f"{name}.parquet", folder / "elsewhere" / f"{name}.parquet")
    moved = [f'data.{n}="{folder}/elsewhere/{n}.parquet"' for n in ("train", "val", "test")]
    assert identity_of(sweep_file, *moved) == before
    write_images(folder / "val.parquet", *labelled(40, seed=77))
    changed = identity_of(sweep_file)
    assert {key for key in before if before[key] != changed[key]} == {"data.val"}


def test_it_is_what_trials_open(sweep_file: Path) -> None:
    for sets in ((), ("data.cache_gb=0",)):  # decoded, and streamed
        sweep = load_sweep(sweep_file, sets)
        dense, _ = check(sweep)
        expected = fingerprint(sweep, dense)
        for split in ("train", "val", "test"):
            assert open_split(sweep, dense, split).digest == expected[f"data.{split}"]


def test_what_has_changed_is_named() -> None:
    began = {"model": "a" * 64, "data.train": "b" * 64}
    refuse_another(began, dict(began), "weekly")
    with pytest.raises(
        SweepError, match=r"data\.train has changed since sweep weekly began .*bbbbbbbbbbbb then"
    ):
        refuse_another(began, began | {"data.train": "c" * 64}, "weekly")


def test_a_ledger_holds_what_a_sweep_began_with(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    sweep.directory.mkdir(parents=True)
    Ledger(sweep).identify({"model": "1"})
    again = Ledger(sweep)
    again.identify({"model": "1"})
    assert len(again.past) == 1
    with pytest.raises(SweepError, match="model has changed since sweep tiny began"):
        Ledger(sweep).identify({"model": "2"})
    assert len(Ledger(sweep).past) == 1
