"""The directory of a sweep: its trials (`trials.parquet`) and its front (`front.json`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pruners.model.files import replace_file
from search.records.front import COSTS, REFERENCE, Front, cost_of_record
from search.records.trial_record import TrialRecord
from search.records.typed import JsonObject, typed

DONE = "done"
"""File of a sweep's directory that says that it is finished."""

MEMBER_KEYS = (
    "trial",
    "name",
    "val_top1",
    "by_class",
    "spread",
    "runs",
    "within_spread",
    "test_top1",
    "gmacs",
    "effective_gmacs",
    "cost_ratio",
    "params",
    "density",
    "images_per_s",
    "latency_ms",
    "epochs",
    "plan_line",
    "plan",
    "shape",
    "origin",
    "of",
    "parameters",
    "methods",
    "checkpoint",
)
_SHOWN = ("val_top1", "gmacs", "effective_gmacs", "params", "density", "images_per_s")
_RECORDS = TypeAdapter(list[TrialRecord])
_NAMES = TypeAdapter(list[str])
_JSON_COLUMNS = ("parameters", "plan", "shape", "history", "by_class")
_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_SCHEMA = pa.schema(
    [(f.name, _TYPES.get(str(f.type).partition(" ")[0], pa.string())) for f in fields(TrialRecord)]
)


def front_json(front: Front) -> JsonObject:
    """Return a front as the values of `front.json`."""
    return {
        "cost": front.cost,
        "hypervolume": front.hypervolume,
        "reference": REFERENCE,
        "classes": list(front.classes),
        "dense": _member(front.dense),
        "front": [_member(record) for record in front.members],
    }


def write_front(path: Path, front: Front) -> None:
    """Write `front.json`."""
    content = json.dumps(front_json(front), indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(content))


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
        rows = [{"status": "finished", **member} for member in values["front"]]
        dense, *members = typed(_RECORDS, [{"status": "dense", **values["dense"]}, *rows])
        cost, volume = values["cost"], float(values["hypervolume"])
        _check_shown(cost, [dense, *members])
        classes = typed(_NAMES, values["classes"])
        return Front(
            cost=cost,
            hypervolume=volume,
            dense=dense,
            members=tuple(members),
            classes=tuple(classes),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no front ({error}); give what a sweep wrote") from error


def write_trials(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write `trials.parquet`, one row per trial; plan, shape and history as JSON."""
    rows = [asdict(record) for record in records]
    for row in rows:
        row |= {column: json.dumps(row[column]) for column in _JSON_COLUMNS}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    replace_file(path, lambda temporary: temporary.write_bytes(sink.getvalue().to_pybytes()))


def read_trials(path: Path) -> list[TrialRecord]:
    """Read `trials.parquet`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a sweep that ran")
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read(use_threads=False).to_pylist()
        for row in rows:
            row |= {column: json.loads(row[column]) for column in _JSON_COLUMNS}
        return typed(_RECORDS, rows)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no table of trials ({reason})") from error


def _check_shown(cost: str, records: Sequence[TrialRecord]) -> None:
    """Check that a front has all that is shown of it.

    Raises:
        ValueError: If it is not.
    """
    if cost not in COSTS:
        raise ValueError(f"cost is {cost!r}; there are {', '.join(COSTS)}")
    for record in records:
        if absent := [key for key in _SHOWN if getattr(record, key) is None]:
            raise ValueError(f"{absent[0]} of trial {record.trial} is absent")
        if not cost_of_record(record, cost) > 0.0:
            raise ValueError(f"{cost} of trial {record.trial} is not above 0")


def _member(record: TrialRecord) -> JsonObject:
    return {key: getattr(record, key) for key in MEMBER_KEYS}
