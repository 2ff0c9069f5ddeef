"""Records a sweep while Ray runs it: Parquet, front, MLflow and terminal, all from the driver."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from pruners import Plan
from search.constraints import violated
from search.growing_front import GrowingFront
from search.journal import Journal
from search.progress import Progress
from search.results import TrialRecord, write_front, write_trials
from search.sweep import Sweep, SweepFailedError
from search.tracking import Tracker
from search.trial_files import model_path

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


JOURNAL = "trials.jsonl"
"""File of a sweep's directory that a trial's record is added to when it ends."""

REST = 19.0
"""How long the tables stay as they are, in multiples of the time that writing them took.

They hold all trials, so that a larger sweep takes longer to write them: at most a twentieth of its
time, however large it is.
"""


class Recorder(tune.Callback):
    """Keeps a `TrialRecord` per trial and writes it wherever people look.

    What ends is in the journal at once; the tables, which are written as a whole, follow. Ray's
    snapshot of the sweep says how long the journal was, so that a continued sweep goes on with the
    same records and MLflow runs.
    """

    def __init__(
        self,
        sweep: Sweep,
        tracker: Tracker,
        progress: Progress,
        *,
        resuming: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Record into the sweep's directory, an open tracker and a terminal."""
        self.sweep, self.tracker, self.progress, self.clock = sweep, tracker, progress, clock
        self.records: dict[str, TrialRecord] = {}
        self.growing = GrowingFront(sweep.cost)
        self.ended = 0
        self.journal = Journal(sweep.directory / JOURNAL)
        self.must_restore = resuming
        self.written, self.due = True, -math.inf  # of the tables: are they current, when again
        if not resuming:
            self.journal.cut(0)

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
        """Return what Ray's snapshot needs beside the journal; MLflow is as far as it."""
        self.tracker.wait()
        running = [dict(vars(r)) for r in self.records.values() if r.status == "running"]
        return {"journal": self.journal.size, "running": running}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot; what ended after it will run again."""
        self.journal.cut(state["journal"])
        records = [TrialRecord(**values) for values in (*self.journal.read(), *state["running"])]
        self.records = {record.trial: record for record in records}
        ended = [record for record in self.records.values() if record.status != "running"]
        self.growing.add(*ended)
        self.ended = len(ended)
        self.must_restore = False
        for record in self.records.values():
            self.progress.restored(record)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Open a record the first time a trial starts."""
        self.progress.started(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Take an epoch's metrics, unless they are known: a trial that starts anew repeats them."""
        name = result["trial"]
        if any(known["epoch"] == result["epoch"] for known in self.records[name].history):
            return
        metrics = {key: float(result[key]) for key in METRICS}
        self.records[name] = with_result(self.records[name], result, metrics)
        self.tracker.epoch(name, result["epoch"], metrics)
        self.progress.epoch(self.records[name])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Close the record of a trial that ended by itself."""
        record = self.records[trial.config["trial"]]
        self._end(record, "stopped" if record.status == "running" else record.status)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Close the record of a trial that Ray gave up."""
        failed = dataclasses.replace(self._record(trial), reason=error_line(trial))
        self._end(failed, "failed")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Let the terminal show that the sweep is alive, and the tables follow."""
        self._write_tables_if_due()
        self.progress.tick()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Write down the last trials; Ray calls this after an interrupt too."""
        if not self.written:
            self._write_tables()
        self.tracker.wait()

    def _record(self, trial: Trial) -> TrialRecord:
        """Return the record of a trial; its first use opens it here and in MLflow."""
        name = trial.config["trial"]
        if name not in self.records:
            self.records[name] = new_record(trial.config)
            self.tracker.start_trial(self.records[name])
        return self.records[name]

    def _judged(self, record: TrialRecord, dense: TrialRecord | None) -> TrialRecord:
        """Return a record that says which constraints it violates, if it was tuned to its end."""
        if record.status != "finished":
            return record
        found = violated(
            self.sweep.constraints,
            params=record.params,
            images_per_s=record.images_per_s,
            drop=_drop(record, dense),
        )
        return dataclasses.replace(record, violates=found)

    def _end(self, record: TrialRecord, status: str) -> None:
        if record.origin == "dense" and status == "finished":
            status = "dense"
        model = "" if status == "failed" else model_path(record.trial, record.epochs)
        record = dataclasses.replace(record, status=status, checkpoint=model)
        new = [self._judged(record, self.growing.dense)]
        if status == "dense":  # what ended before it could not be compared with it
            early = [r for r in self.records.values() if r.trial != record.trial]
            new += [self._judged(r, record) for r in early if r.status == "finished"]
        for changed in new:
            self.records[changed.trial] = changed
            self.journal.append(vars(changed))
        self.ended += 1
        self.tracker.finish_trial(record)
        first = [self.records[record.of]] if record.of in self.records else []
        self.growing.add(*new, *first)
        front = self.growing.front
        if front is not None:
            self.tracker.front_grew(front, self.ended)
        self.written = False
        self._write_tables_if_due()
        self.progress.ended_with(new[0], front)

    def _write_tables_if_due(self) -> None:
        if not self.written and self.clock() >= self.due:
            self._write_tables()

    def _write_tables(self) -> None:
        start = self.clock()
        records = sorted(self.records.values(), key=lambda r: r.trial)
        write_trials(self.sweep.directory / "trials.parquet", records)
        front = self.growing.front
        if front is not None:
            write_front(self.sweep.directory / "front.json", front)
            self.tracker.update_front(front, records)
        self.written, self.due = True, self.clock() + REST * (self.clock() - start)


def _drop(record: TrialRecord, dense: TrialRecord | None) -> float | None:
    if dense is None or dense.val_top1 is None or record.val_top1 is None:
        return None
    return dense.val_top1 - record.val_top1


def new_record(config: dict[str, Any]) -> TrialRecord:
    """Return the record of a trial that has just got its configuration."""
    values = json.loads(config["plan"])
    plan = Plan.from_json(values)
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
        plan=values,
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
