"""Sweeps that an earlier version began are continued by this one.

A file of `kept_sweeps/` is a folder in which that version was interrupted in the middle of a trial,
named by the day of its last commit: model, images, `tiny.toml`, `results/`.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from search.__main__ import main
from search.records.files import read_front, read_trials
from search.records.journal import Journal
from search.records.ledger import LEDGER
from search.tracking.run_ids import RUNS

KEPT = Path(__file__).parent / "kept_sweeps"
MADE_IN = "/tmp/kept"
"""Where the kept folders lay; whoever moves a sweep replaces such paths as `unpacked` does."""

UNDISTURBED = {
    "0000": 1.0,
    "0001": 0.5004989100733782,
    "0002": 0.8985370421540634,
    "0003": 0.7190368732921925,
    "0004": 0.754943047496239,
}
"""Cost ratio of each trial where that version ran the sweep without an interruption."""


def unpacked(version: str, folder: Path) -> Path:
    """Unpack a kept sweep where nothing knows its old place: return the sweep's directory."""
    with tarfile.open(KEPT / f"{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    directory = folder / "results" / "tiny"
    for file in (folder / "tiny.toml", directory / "sweep.toml"):
        file.write_text(file.read_text().replace(MADE_IN, str(folder)))
    places = _rewritten(directory / LEDGER, lambda line: _replaced(line, folder))
    # MLflow's journal says how far the ledger has been logged, in bytes.
    _rewritten(
        directory / RUNS,
        lambda line: {**line, "place": places[line["place"]]} if "place" in line else line,
    )
    with sqlite3.connect(directory / "mlflow.db") as database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (MADE_IN, str(folder))
            )
    return directory


def _replaced(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    moved: dict[str, Any] = json.loads(json.dumps(line).replace(MADE_IN, str(folder)))
    return moved


def _rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[int, int]:
    """Change each line of a journal; return where each line ended -> where it ends now."""
    lines = Journal(path).read_from(0)
    path.unlink()
    places = {}
    for line, end in lines:
        Journal(path).append(change(line))
        places[end] = path.stat().st_size
    return places


def epochs_of(directory: Path) -> list[dict[str, Any]]:
    events = Journal(directory / LEDGER).read()
    return [event["result"] for event in events if event["event"] == "epoch"]


OTHER_CUTS = {"2026-11-26"}
"""Versions whose cuts were others: they were not compensated."""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("version", sorted(OTHER_CUTS))
def test_whose_cuts_were_others_is_not_continued_but_read(
    version: str, tmp_path: Path, capsys
) -> None:
    directory = unpacked(version, tmp_path)
    before = (directory / LEDGER).read_bytes()
    assert main(["run", str(tmp_path / "tiny.toml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "by another version" in said[0]
    assert "or start another sweep from its front (start_from)" in said[0]
    assert (directory / LEDGER).read_bytes().startswith(before)
    assert read_trials(directory / "trials.parquet")
    assert read_front(directory / "front.json").members


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "version", sorted({file.name.split(".")[0] for file in KEPT.iterdir()} - OTHER_CUTS)
)
def test_it_goes_on_where_it_was_interrupted(version: str, tmp_path: Path) -> None:
    directory = unpacked(version, tmp_path)
    before = epochs_of(directory)
    assert max(r["epoch"] for r in before if r["trial"] == "0002") < 8

    assert main(["run", str(tmp_path / "tiny.toml")]) == 0

    after = epochs_of(directory)
    assert after[: len(before)] == before
    assert Counter(r["trial"] for r in after) == {"0000": 1} | dict.fromkeys(
        ("0001", "0002", "0003", "0004"), 9
    )
    assert set(Counter((r["trial"], r["epoch"]) for r in after).values()) == {1}
    records = read_trials(directory / "trials.parquet")
    assert {r.trial: r.cost_ratio for r in records} == pytest.approx(UNDISTURBED, rel=1e-6)
    assert [r.status for r in records] == ["dense", *["finished"] * 4]
    front = read_front(directory / "front.json")
    assert front.members
    assert all(member.test_top1 is not None for member in front.members)
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id], "tags.trial != ''")
    assert {run.data.tags["trial"] for run in runs} == set(UNDISTURBED)
    for run in runs:
        steps = client.get_metric_history(run.info.run_id, "val_top1")
        epochs = 1 if run.data.tags["trial"] == "0000" else 9
        assert [metric.step for metric in steps] == list(range(epochs))
