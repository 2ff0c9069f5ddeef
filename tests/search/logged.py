"""Events of a ledger, and sweeps that are logged in MLflow."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from search.records.trial_record import TrialRecord
from search.sweep.spec import Budget, DataSpec, ModelSpec, StepSpec, Sweep
from search.tracking.runs import SweepRuns
from tests.models import build_tiny
from tests.search.trial_events import config_of, result_of

TINY_SHAPE = build_tiny().shape()
SHAPE = TINY_SHAPE.to_json()


def asked(r: TrialRecord, at: int = 1_000) -> dict[str, Any]:
    config = config_of(
        r.trial,
        origin=r.origin,
        of=r.of,
        seed=r.seed,
        parameters=r.parameters,
        cost_ratio=r.cost_ratio,
        plan=json.dumps(r.plan),
    )
    return {"event": "asked", "time": at, "config": config.to_json()}


def epoch(r: TrialRecord, number: int, top1: float, at: int = 1_001) -> dict[str, Any]:
    result = result_of(r.trial, epoch=number, val_top1=top1, shape=json.dumps(SHAPE))
    return {"event": "epoch", "time": at, "result": result.to_json()}


def ended(r: TrialRecord, count: int, volume: float | None, at: int = 1_002) -> dict[str, Any]:
    counted = {"count": count, "hypervolume": volume, "front_size": 1}
    base = {"event": "ended", "time": at, "trial": r.trial, "status": r.status}
    return {**base, "reason": r.reason, **counted}


def log(runs: SweepRuns, events: Iterable[dict[str, Any]]) -> None:
    for event in events:
        runs.log(event, runs.place + 1)
        runs.again = False


def tracked(directory: Path, tracking: str | None = None) -> Sweep:
    """A sweep of a directory."""
    return Sweep(
        name=directory.name,
        storage=str(directory.parent),
        tracking=tracking,
        model=ModelSpec(path="vit.safetensors"),
        data=DataSpec(train="train", val="val", test="test"),
        steps=(StepSpec(method="grouped"),),
        budget=Budget(low=0.3, high=0.9),
        trials=5,
        epochs=2,
    )


@cache
def _empty_store() -> Path:
    """A store of MLflow's with its tables, which take a second to make."""
    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def opened(directory: Path) -> SweepRuns:
    """As a driver that starts, or starts again; the first finds a store without experiments."""
    store = directory / "mlflow.db"
    if not store.exists():
        with (
            closing(sqlite3.connect(_empty_store())) as one,
            closing(sqlite3.connect(store)) as copy,
        ):
            one.backup(copy)
    return SweepRuns.open(tracked(directory), TINY_SHAPE)
