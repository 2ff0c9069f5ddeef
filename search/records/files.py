"""The directory of a sweep: its trials (`trials.parquet`) and its front (`front.json`)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from search import pareto

DONE = "done"
"""File of a sweep's directory that says that it is finished."""

TrialName = Annotated[str, Field(pattern=r"^[0-9]{4,9}$")]
"""Name of a trial, which its folder bears."""

ModelPath = Annotated[str, Field(pattern=r"^(models/[0-9]{4,9}/epoch-[0-9]{4,9})?$")]
"""Where a trial's model lies, below the sweep's directory; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What came of one trial.

    Attributes:
        trial: Number of the trial, four digits.
        name: What a person tells it apart by.
        status: "running", "finished", "stopped" (ended early), "failed", or "dense".
        reason: Why it failed, in one line.
        origin: "dense", "ladder" (the methods' own allocations), "alone" (a single method's),
            "earlier" (another sweep's front), "search", "refined" (near the front), "confirm"
            (other seeds) or "final" (longer).
        of: Trial whose plan this one trains again; empty for a plan of its own.
        seed: Which stream of images and random numbers it saw.
        parameters: What was sampled, by name.
        methods: Methods of the plan's active steps, joined by "+".
        epochs: Epochs of fine-tuning that were finished.
        spent: Epochs of fine-tuning that the sweep had spent, on all trials, when this one ended.
        cost_ratio: Cost as a share of the dense model's, as the plan predicts it.
        val_top1: Percent, after the last epoch; None before the first result. Of a member of a
            front that was confirmed, the mean of the further seeds: the first was chosen for it.
        by_class: The same of each class, of a trial that ran to its end; None for a class without
            images.
        spread: Standard deviation of top-1 over all seeds, the first included; None with one.
        runs: Number of seeds.
        within_spread: Whether the next cheaper member of the front may be as good: the difference
            is below the spread of the two.
        test_top1: Percent; only of the front's members and the dense model.
        gmacs: 1e9 multiply-adds of dense kernels.
        effective_gmacs: 1e9 multiply-adds on weights that are not zero.
        params: Stored parameters.
        density: Share of the parameters that is not masked.
        images_per_s: Measured in the trial's last evaluation.
        latency_ms: Time per image in its first one, in full batches.
        violates: Constraints of the sweep that do not hold; empty if all do.
        plan: The plan as JSON values.
        plan_line: The plan in one line.
        shape: The shape as JSON values; empty before the first result.
        seconds: Time the trial has run.
        history: Metrics of each epoch, 0 (before fine-tuning) first.
        checkpoint: Directory of the model, below the sweep's directory; empty without one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # for records that are read

    trial: TrialName
    name: str
    status: Annotated[str, Field(pattern=r"^(running|finished|stopped|failed|dense)$")]
    reason: str = ""
    origin: str
    of: str = ""
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    methods: str
    epochs: int = 0
    spent: int = 0
    cost_ratio: float
    val_top1: float | None = None
    by_class: list[float | None] = field(default_factory=list)
    spread: float | None = None
    runs: int = 1
    within_spread: bool = False
    test_top1: float | None = None
    gmacs: float | None = None
    effective_gmacs: float | None = None
    params: int | None = None
    density: float | None = None
    images_per_s: float | None = None
    latency_ms: float | None = None
    violates: str = ""
    plan: dict[str, Any]
    plan_line: str
    shape: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: ModelPath = ""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The trials worth having.

    Attributes:
        cost: "effective_gmacs", "gmacs" or "latency", what accuracy is traded against.
        hypervolume: Area dominated in (cost / dense cost, top-1 / 100), up to `REFERENCE`.
        dense: The dense model, as trained, without any fine-tuning.
        members: The members, cheapest first.
        classes: Names of the classes; empty if they have none.
    """

    cost: str
    hypervolume: float
    dense: TrialRecord
    members: tuple[TrialRecord, ...]
    classes: tuple[str, ...] = ()


REFERENCE = {"cost_ratio": 1.0, "top1": 0.0}
"""Reference point of the hypervolume: the dense model's cost, and no correct answer."""

COSTS = ("effective_gmacs", "gmacs", "latency")
"""What accuracy can be traded against."""

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
T = TypeVar("T")
_RECORDS = TypeAdapter(list[TrialRecord])
_NAMES = TypeAdapter(list[str])
_JSON_COLUMNS = ("parameters", "plan", "shape", "history", "by_class")
_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_SCHEMA = pa.schema(
    [(f.name, _TYPES.get(str(f.type).partition(" ")[0], pa.string())) for f in fields(TrialRecord)]
)


def build_front(records: Sequence[TrialRecord], cost: str, classes: tuple[str, ...] = ()) -> Front:
    """Return the non-dominated ones of the finished trials that violate no constraint.

    As soon as plans have been trained with further seeds, only these are compared, by their means:
    a single run that was best of many is best by luck too.

    Raises:
        ValueError: If the dense model is not among the records.
    """
    dense = next((r for r in records if r.status == "dense"), None)
    if dense is None:
        raise ValueError("no record has the status 'dense'; measure the dense model first")
    whole = [
        r for r in records if r.status == "finished" and not r.violates and _is_finite(r, cost)
    ]
    points = _confirmed(whole)
    costs = [cost_of_record(r, cost) / cost_of_record(dense, cost) for r in points]
    accuracies = [(r.val_top1 or 0.0) / 100.0 for r in points]
    members = [r for r, best in zip(points, pareto.front(costs, accuracies), strict=True) if best]
    volume = pareto.hypervolume(
        costs,
        accuracies,
        reference_cost=REFERENCE["cost_ratio"],
        reference_accuracy=REFERENCE["top1"],
    )
    members.sort(key=lambda r: cost_of_record(r, cost))
    return Front(
        cost=cost, hypervolume=volume, dense=dense, members=_marked(members), classes=classes
    )


def cost_of_record(record: TrialRecord, cost: str) -> float:
    """Return what a trial costs: GMACs, or milliseconds per image."""
    return float(getattr(record, "latency_ms" if cost == "latency" else cost))


def _confirmed(whole: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Put a plan's runs of the same length together; leave out what others have more seeds of."""
    again: dict[tuple[str, int], list[TrialRecord]] = {}
    for record in whole:
        if record.origin == "confirm":
            again.setdefault((record.of, record.epochs), []).append(record)
    if not again:
        return list(whole)
    found = [record for record in whole if record.origin == "final"]
    for record in whole:
        runs = again.get((record.trial, record.epochs))
        if runs:
            tops = [run.val_top1 or 0.0 for run in runs]
            found.append(
                dataclasses.replace(
                    record,
                    val_top1=statistics.fmean(tops),
                    spread=statistics.stdev([record.val_top1 or 0.0, *tops]),
                    runs=1 + len(runs),
                )
            )
    return found


def _marked(members: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Mark members that the next cheaper one may equal."""
    marked = list(members[:1])
    for cheaper, member in itertools.pairwise(members):
        noise = math.hypot(cheaper.spread or 0.0, member.spread or 0.0)
        gain = (member.val_top1 or 0.0) - (cheaper.val_top1 or 0.0)
        marked.append(dataclasses.replace(member, within_spread=gain < noise))
    return tuple(marked)


def front_json(front: Front) -> dict[str, Any]:
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
        rows = [{"status": "finished", **member} for member in values["front"]]
        dense, *members = _checked(_RECORDS, [{"status": "dense", **values["dense"]}, *rows])
        cost, volume = values["cost"], float(values["hypervolume"])
        _check_shown(cost, [dense, *members])
        classes = tuple(_checked(_NAMES, values["classes"]))
        return Front(
            cost=cost, hypervolume=volume, dense=dense, members=tuple(members), classes=classes
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
        with pq.ParquetFile(path) as file:
            rows = file.read(use_threads=False).to_pylist()
        for row in rows:
            row |= {column: json.loads(row[column]) for column in _JSON_COLUMNS}
        return _checked(_RECORDS, rows)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no table of trials ({reason})") from error


def _checked(kind: TypeAdapter[list[T]], values: list[Any]) -> list[T]:
    """Return values of the right types.

    Raises:
        ValueError: For the first that is not, in one line.
    """
    try:
        return kind.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc']}: {first['msg']}") from error


def _check_shown(cost: str, records: Sequence[TrialRecord]) -> None:
    """Check that what a front shows is there.

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


def _member(record: TrialRecord) -> dict[str, Any]:
    return {key: getattr(record, key) for key in MEMBER_KEYS}


def _is_finite(record: TrialRecord, cost: str) -> bool:
    values = (record.val_top1, getattr(record, "latency_ms" if cost == "latency" else cost))
    return all(value is not None and math.isfinite(value) for value in values)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
