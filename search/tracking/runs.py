"""Logs a sweep to MLflow: a parent run per sweep, a child run per trial."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pruners import ViTShape, cost_of
from search.records.events import EpochResult, Event, TrialConfig
from search.records.front import Front
from search.records.front_diff import Change, change
from search.records.journal import Journal
from search.records.ledger import new_record
from search.records.trial_record import TrialRecord
from search.report.drawing import write_png
from search.report.kept import draw_plan
from search.sweep.spec import Sweep, SweepError
from search.tracking.addresses import local_uri
from search.tracking.client import first_line, mlflow_client
from search.tracking.front_tags import FrontTags
from search.tracking.note import about_sweep
from search.tracking.params import trial_params
from search.tracking.parent_page import ParentPage
from search.tracking.run_ids import RUNS, RunIds, create_parent, now
from search.tracking.views import FRONT, TRIALS, view_address

_STATUS = {"finished": "FINISHED", "dense": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100  # that MLflow takes in one batch


class SweepRuns:
    """Logs one sweep to its runs in MLflow, one event of the ledger at a time.

    Each event that is logged is noted in the sweep's directory. Between the two a process may die,
    and an answer of MLflow may be lost.

    Attributes:
        trials: Trial -> run.
        place: Place in the ledger up to which it has been logged.
        again: Whether the next event may be logged already, wholly or in part.
    """

    def __init__(
        self,
        client: MlflowClient,
        notes: Journal,
        lines: Sequence[dict],
        sweep: Sweep,
        dense: ViTShape,
        earlier: Front | None,
    ) -> None:
        """Use `open` instead."""
        ids = RunIds.read(lines, notes.path)
        self.client, self.notes, self.directory = client, notes, notes.path.parent
        self.earlier = earlier
        self.experiment, self.parent = ids.experiment, ids.parent
        self.trials, self.place = ids.trials, ids.place
        self.tags = FrontTags(client, ids)
        self.again = True
        self.dense = dense.to_json()
        about = about_sweep(sweep, cost_of(dense).macs)
        self.page = ParentPage(client, self.parent, sweep, about, earlier)

    @classmethod
    def open(
        cls,
        sweep: Sweep,
        dense: ViTShape,
        may_write: Callable[[], None] = lambda: None,
        earlier: Front | None = None,
    ) -> SweepRuns:
        """Open the runs of a sweep: those that its directory names, or new ones.

        Args:
            sweep: The sweep, whose directory exists.
            dense: Shape of its dense model.
            may_write: Asked before anything is logged; it raises an error if this must not be.
            earlier: The front that the sweep starts from, if it does.

        Raises:
            SweepError: If there are none yet, and MLflow refuses to create any.
        """
        store = sweep.tracking or local_uri(sweep.directory)
        notes = Journal(sweep.directory / RUNS, may_write)
        try:
            client = mlflow_client(store)
            if noted := notes.read():
                return cls(client, notes, noted, sweep, dense, earlier)
            first = create_parent(client, store, sweep)
        except (MlflowException, OSError) as error:
            raise SweepError(
                f"tracking = {sweep.tracking!r}: {first_line(error)}; give a server that runs"
            ) from error
        notes.append(first)
        return cls(client, notes, [first], sweep, dense, earlier)

    def log(self, event: Event, place: int) -> None:
        """Log an event of the ledger, and note the place behind it, where the next one begins."""
        log = {
            "learned": self._learned,
            "elastic": self._elastic,
            "asked": self._start_trial,
            "epoch": self._log_epoch,
            "ended": self._end_trial,
        }.get(event["event"])
        if log is not None:
            log(event)
        self.notes.append({"place": place})
        self.place = place

    def show(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Show a front: tags of its members, the note, and now and then pictures."""
        self.tags.update(front, self.trials)
        self.page.show(front, records, self._links())

    def close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the final front with its test accuracies, and close the parent run."""
        for member in (*front.members, front.dense):
            if member.test_top1 is not None:
                metric = Metric("test_top1", member.test_top1, now(), 0)
                self._log_once(self.trials[member.trial], [metric])
        self.tags.update(front, self.trials)
        self.page.describe(front, records, self._links())
        self.page.draw(front, records)
        if self.earlier is not None:
            self._log_once(self.parent, change_metrics(change(self.earlier, front)))
        self.client.set_terminated(self.parent, "FINISHED")

    def _links(self) -> dict[str, str]:
        """Return trial, or view -> address of its run, relative to MLflow's page."""
        base = f"#/experiments/{self.experiment}/runs"
        views = {name: view_address(self.experiment, name) for name in (FRONT, TRIALS)}
        return views | {trial: f"{base}/{run}" for trial, run in self.trials.items()}

    def _learned(self, event: Event) -> None:
        """Log the methods' learning runs: a table, and the seconds they took together."""
        self.client.log_dict(self.parent, {"runs": event["runs"]}, "learned.json")
        self.page.draw_learned()
        seconds = sum(run["report"]["seconds"] for run in event["runs"])
        metric = Metric("learning_seconds", seconds, event["time"], 0)
        self._log_once(self.parent, [metric])

    def _elastic(self, event: Event) -> None:
        """Log the report of the elastic start."""
        self.client.log_dict(self.parent, event["run"], "elastic.json")

    def _start_trial(self, event: Event) -> None:
        record = new_record(TrialConfig.from_json(event["config"]))
        tags = {
            "mlflow.parentRunId": self.parent,
            "trial": record.trial,
            "origin": record.origin,
            "of": record.of,
            "methods": record.methods,
            "status": "running",
            "front": "false",
        }
        run = self._found(record.trial) if self.again else None
        if run is None:
            created = self.client.create_run(self.experiment, event["time"], tags, record.name)
            run = created.info.run_id
        params = [Param(key, value) for key, value in trial_params(record).items()][:_MOST_PARAMS]
        self.client.log_batch(run, params=params)
        self.client.log_dict(run, record.plan, "plan.json")
        self.notes.append({"trial": record.trial, "run": run})
        self.trials[record.trial] = run

    def _found(self, trial: str) -> str | None:
        """Return the run of a trial in MLflow, noted or not; None if it has none."""
        filter_ = f"tags.`mlflow.parentRunId` = '{self.parent}' AND tags.trial = '{trial}'"
        found = self.client.search_runs([self.experiment], filter_, max_results=1)
        return found[0].info.run_id if found else None

    def _log_epoch(self, event: Event) -> None:
        result = EpochResult.from_json(event["result"])
        metrics = [
            Metric(key, value, event["time"], result.epoch)
            for key, value in result.metrics().items()
        ]
        run = self.trials[result.trial]
        if result.epoch == 0:
            kept = draw_plan(json.loads(result.shape), self.dense)
            with tempfile.TemporaryDirectory() as folder:
                write_png(kept, Path(folder) / "plan.png")
                self.client.log_artifact(run, str(Path(folder) / "plan.png"))
        self._log_once(run, metrics)

    def _end_trial(self, event: Event) -> None:
        run = self.trials[event["trial"]]
        tags = [RunTag("status", event["status"]), RunTag("reason", event["reason"])]
        self.client.log_batch(run, tags=tags)
        self.client.set_terminated(run, _STATUS[event["status"]], event["time"])
        if event["hypervolume"] is not None:
            metrics = [
                Metric(key, float(event[key]), event["time"], event["count"])
                for key in ("hypervolume", "front_size")
            ]
            self._log_once(self.parent, metrics)

    def _log_once(self, run: str, metrics: Sequence[Metric]) -> None:
        """Log metrics of one step, all or none, unless they are there."""
        if self.again:
            known = self.client.get_metric_history(run, metrics[0].key)
            if any(metric.step == metrics[0].step for metric in known):
                return
        self.client.log_batch(run, metrics=metrics)


def change_metrics(change: Change) -> list[Metric]:
    """Return the metrics of a change of the front: hypervolumes, points gained and lost."""
    values = {
        "hypervolume_before": change.before,
        "hypervolume_after": change.after,
        "points_gained": len(change.gained),
        "points_lost": len(change.lost),
    }
    return [Metric(key, float(value), now(), 0) for key, value in values.items()]
