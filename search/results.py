"""The directory of a sweep: its trials (`trials.parquet`) and its front (`front.json`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from search import pareto


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What came of one trial.

    Attributes:
        trial: Number of the trial, four digits.
        name: What a person tells it apart by.
        status: "running", "finished", "stopped" (ended early), "failed", or "dense".
        reason: Why it failed, in one line.
        origin: "dense", "ladder" or "search".
        methods: Methods of the plan's active steps, joined by "+".
        epochs: Epochs of fine-tuning that were finished.
        cost_ratio: Cost as a share of the dense model's, as the plan predicts it.
        val_top1: Percent, after the last epoch; None before the first result.
        test_top1: Percent; only of the front's members and the dense model.
        gmacs: 1e9 multiply-adds of dense kernels.
        effective_gmacs: 1e9 multiply-adds on weights that are not zero.
        params: Stored parameters.
        density: Share of the parameters that is not masked.
        images_per_s: Measured in the trial's last evaluation.
        plan: The plan as JSON values.
        plan_line: The plan in one line.
        shape: The shape as JSON values; empty before the first result.
        seconds: Time the trial has run.
        history: Metrics of each epoch, 0 (before fine-tuning) first.
        checkpoint: Directory of the model, below the sweep's directory; empty without one.
    """

    trial: str
    name: str
    status: str
    reason: str = ""
    origin: str
    methods: str
    epochs: int = 0
    cost_ratio: float
    val_top1: float | None = None
    test_top1: float | None = None
    gmacs: float | None = None
    effective_gmacs: float | None = None
    params: int | None = None
    density: float | None = None
    images_per_s: float | None = None
    plan: dict[str, Any]
    plan_line: str
    shape: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The trials worth having.

    Attributes:
        cost: "effective_gmacs" or "gmacs", what accuracy is traded against.
        hypervolume: Area dominated in (cost / dense cost, top-1 / 100), up to `REFERENCE`.
        dense: The dense model, as trained, without any fine-tuning.
        members: The members, cheapest first.
    """

    cost: str
    hypervolume: float
    dense: TrialRecord
    members: tuple[TrialRecord, ...]


REFERENCE = {"cost_ratio": 1.0, "top1": 0.0}
"""Reference point of the hypervolume: the dense model's cost, and no correct answer."""

MEMBER_KEYS = (
    "trial",
    "name",
    "val_top1",
    "test_top1",
    "gmacs",
    "effective_gmacs",
    "cost_ratio",
    "params",
    "density",
    "images_per_s",
    "epochs",
    "plan_line",
    "plan",
    "shape",
    "origin",
    "methods",
    "checkpoint",
)
_JSON_COLUMNS = ("plan", "shape", "history")
_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema(
    [(f.name, _TYPES.get(str(f.type).partition(" ")[0], pa.string())) for f in fields(TrialRecord)]
)


def build_front(records: Sequence[TrialRecord], cost: str) -> Front:
    """Return the non-dominated ones of the finished trials.

    Raises:
        ValueError: If the dense model is not among the records.
    """
    dense = next((r for r in records if r.status == "dense"), None)
    if dense is None:
        raise ValueError("no record has the status 'dense'; measure the dense model first")
    whole = [r for r in records if r.status == "finished" and _is_finite(r, cost)]
    costs = [getattr(r, cost) / getattr(dense, cost) for r in whole]
    accuracies = [(r.val_top1 or 0.0) / 100.0 for r in whole]
    members = [r for r, best in zip(whole, pareto.front(costs, accuracies), strict=True) if best]
    volume = pareto.hypervolume(
        costs,
        accuracies,
        reference_cost=REFERENCE["cost_ratio"],
        reference_accuracy=REFERENCE["top1"],
    )
    members.sort(key=lambda r: getattr(r, cost))
    return Front(cost=cost, hypervolume=volume, dense=dense, members=tuple(members))


def front_json(front: Front) -> dict[str, Any]:
    """Return a front as the values of `front.json`."""
    return {
        "cost": front.cost,
        "hypervolume": front.hypervolume,
        "reference": REFERENCE,
        "dense": _member(front.dense),
        "front": [_member(record) for record in front.members],
    }


def write_front(path: Path, front: Front) -> None:
    """Write `front.json`."""
    _replace(path, (json.dumps(front_json(front), indent=1) + "\n").encode())


def read_front(path: Path) -> Front:
    """Read `front.json`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a front.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a sweep that ran")
    try:
        values = json.loads(path.read_text())
        dense = TrialRecord(status="dense", **values["dense"])
        members = tuple(TrialRecord(status="finished", **member) for member in values["front"])
        volume = float(values["hypervolume"])
        return Front(cost=values["cost"], hypervolume=volume, dense=dense, members=members)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no front ({error}); give what a sweep wrote") from error


def write_trials(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write `trials.parquet`, one row per trial; plan, shape and history as JSON."""
    rows = [asdict(record) for record in records]
    for row in rows:
        row |= {column: json.dumps(row[column]) for column in _JSON_COLUMNS}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    _replace(path, sink.getvalue().to_pybytes())


def read_trials(path: Path) -> list[TrialRecord]:
    """Read `trials.parquet`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a sweep that ran")
    try:
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= {column: json.loads(row[column]) for column in _JSON_COLUMNS}
        return [TrialRecord(**row) for row in rows]
    except (pa.ArrowInvalid, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of trials ({error})") from error


def _member(record: TrialRecord) -> dict[str, Any]:
    return {key: getattr(record, key) for key in MEMBER_KEYS}


def _is_finite(record: TrialRecord, cost: str) -> bool:
    values = (record.val_top1, getattr(record, cost))
    return all(value is not None and math.isfinite(value) for value in values)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
