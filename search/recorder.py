"""Records a sweep while Ray runs it: Parquet, front, MLflow and terminal, all from the driver."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from pruners import Plan
from search.constraints import violated
from search.progress import Progress
from search.results import TrialRecord, build_front, write_front, write_trials
from search.sweep import Sweep, SweepFailedError
from search.tracking import Tracker

METRICS = (
    "val_top1",
    "val_loss",
    "train_loss",
    "gmacs",
    "effective_gmacs",
    "cost_ratio",
    "params",
    "density",
    "images_per_s",
    "latency_ms",
    "seconds",
)
"""Keys of a trial's result that are metrics."""


class Recorder(tune.Callback):
    """Keeps a `TrialRecord` per trial and writes it wherever people look.

    Its state is saved with Ray's snapshot of the sweep, so that a continued sweep goes on with the
    same records and MLflow runs.
    """

    def __init__(
        self, sweep: Sweep, tracker: Tracker, progress: Progress, *, resuming: bool = False
    ) -> None:
        """Record into the sweep's directory, an open tracker and a terminal."""
        self.sweep, self.tracker, self.progress = sweep, tracker, progress
        self.records: dict[str, TrialRecord] = {}
        self.must_restore = resuming

    def setup(self, **info: Any) -> None:
        """Refuse to start from zero where a sweep was to be continued.

        Ray only logs it when it cannot restore a run, and starts anew.
        """
        if self.must_restore:
            raise SweepFailedError(
                f"the state of the sweep in {self.sweep.directory} cannot be read; "
                "move the directory away to start anew"
            )

    def get_state(self) -> dict[str, Any]:
        """Return the records for Ray's snapshot."""
        return {"records": [dataclasses.asdict(record) for record in self.records.values()]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot."""
        records = [TrialRecord(**values) for values in state["records"]]
        self.records = {record.trial: record for record in records}
        self.must_restore = False
        for record in records:
            self.progress.restored(record)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Open a record the first time a trial starts."""
        self.progress.started(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Take an epoch's metrics."""
        name = result["trial"]
        metrics = {key: float(result[key]) for key in METRICS}
        self.records[name] = with_result(self.records[name], result, metrics)
        self.tracker.epoch(name, result["epoch"], metrics)
        self.progress.epoch(self.records[name])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Close the record of a trial that ended by itself."""
        record = self.records[trial.config["trial"]]
        self._end(record, "stopped" if record.status == "running" else record.status, trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Close the record of a trial that Ray gave up."""
        self._end(
            dataclasses.replace(self._record(trial), reason=error_line(trial)), "failed", trial
        )

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Let the terminal show that the sweep is alive."""
        self.progress.tick()

    def _record(self, trial: Trial) -> TrialRecord:
        """Return the record of a trial; its first use opens it here and in MLflow."""
        name = trial.config["trial"]
        if name not in self.records:
            self.records[name] = new_record(trial.config)
            self.tracker.start_trial(self.records[name])
        return self.records[name]

    def _violates(self, record: TrialRecord) -> str:
        """Say which constraints a trial that was tuned to its end violates."""
        if record.status != "finished":
            return ""
        dense = next((r for r in self.records.values() if r.status == "dense"), None)
        return violated(
            self.sweep.constraints,
            params=record.params,
            images_per_s=record.images_per_s,
            drop=_drop(record, dense),
        )

    def _end(self, record: TrialRecord, status: str, trial: Trial) -> None:
        if record.origin == "dense" and status == "finished":
            status = "dense"
        checkpoint = _checkpoint_path(trial, self.sweep.directory)
        record = dataclasses.replace(record, status=status, checkpoint=checkpoint)
        record = dataclasses.replace(record, violates=self._violates(record))
        self.records[record.trial] = record
        records = sorted(self.records.values(), key=lambda r: r.trial)
        self.tracker.finish_trial(record)
        write_trials(self.sweep.directory / "trials.parquet", records)
        front = None
        if any(r.status == "dense" for r in records):
            front = build_front(records, self.sweep.cost)
            write_front(self.sweep.directory / "front.json", front)
            ended = sum(r.status != "running" for r in records)
            self.tracker.update_front(front, records, ended)
        self.progress.ended_with(record, front)


def _drop(record: TrialRecord, dense: TrialRecord | None) -> float | None:
    if dense is None or dense.val_top1 is None or record.val_top1 is None:
        return None
    return dense.val_top1 - record.val_top1


def new_record(config: dict[str, Any]) -> TrialRecord:
    """Return the record of a trial that has just got its configuration."""
    plan = Plan.from_json(config["plan"])
    methods = "+".join(step.pruner.name for step in plan.steps if step.active) or "dense"
    ratio = config["cost_ratio"]
    return TrialRecord(
        trial=config["trial"],
        name=f"{config['trial']} {methods}"
        + (f" {ratio:.2f}x" if methods != "dense" else "")
        + (f" ({config['origin']} {config['of']})" if config["of"] else ""),
        status="running",
        reason="",
        origin=config["origin"],
        of=config["of"],
        seed=config["seed"],
        parameters=config["parameters"],
        methods=methods,
        epochs=0,
        cost_ratio=ratio,
        val_top1=None,
        test_top1=None,
        gmacs=None,
        effective_gmacs=None,
        params=None,
        density=None,
        images_per_s=None,
        plan=config["plan"],
        plan_line=plan.describe(),
        shape={},
        seconds=0.0,
        history=[],
        checkpoint="",
    )


def with_result(
    record: TrialRecord, result: dict[str, Any], metrics: dict[str, float]
) -> TrialRecord:
    """Return a record with one more epoch."""
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    return dataclasses.replace(
        record,
        status=result["status"],
        reason=result["reason"],
        epochs=result["epoch"],
        shape=json.loads(result["shape"]),
        history=[*record.history, {"epoch": result["epoch"], **finite}],
        **{
            key: result[key]
            for key in (
                "val_top1",
                "gmacs",
                "effective_gmacs",
                "params",
                "density",
                "images_per_s",
                "latency_ms",
                "seconds",
            )
        },
    )


def error_line(trial: Trial) -> str:
    """Return the last line of what went wrong in a trial."""
    error = trial.get_pickled_error() or trial.get_error()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process died"


def _checkpoint_path(trial: Trial, directory: Path) -> str:
    if trial.checkpoint is None:
        return ""
    return str(Path(trial.checkpoint.path).resolve().relative_to(directory.resolve()))
