"""MLflow: a parent run per sweep, a child run per trial, and what is logged to them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

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
from search.sweep.toml import sweep_toml
from search.sweep.tracking_uri import SQLITE, artifacts_beside
from search.tracking.client import mlflow_client
from search.tracking.note import about_sweep
from search.tracking.parent_page import ParentPage
from search.tracking.views import FRONT, TRIALS, view_address, view_tags

RUNS = "mlflow.jsonl"
"""File of a sweep's directory that says which MLflow runs are its own, first the sweep's, and how
far the ledger has been logged.
"""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # metrics first, in the UI
_STATUS = {"finished": "FINISHED", "dense": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100  # that MLflow takes in one batch
_MOST_RUNS = 50_000  # that MLflow returns in one answer


class SweepRuns:
    """The runs of one sweep in MLflow: what is written to them, one event of the ledger at a time.

    What is logged is noted in the sweep's directory. Between the two a process may die, and an
    answer of MLflow may be lost.

    Attributes:
        trials: Trial -> run.
        place: How far the ledger has been logged.
        again: Whether what is logged next may be there already, wholly or in part.
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
        self.client, self.notes, self.directory = client, notes, notes.path.parent
        self.earlier = earlier
        try:
            self.experiment, self.parent = str(lines[0]["experiment"]), str(lines[0]["parent"])
            self.trials = {
                str(line["trial"]): str(line["run"]) for line in lines if "trial" in line
            }
            places = [int(line["place"]) for line in lines if "place" in line]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{self.notes.path} lacks something ({error}); put back a copy of it, "
                "or move it away to log to new runs"
            ) from error
        self.place = max(0, places[-1]) if places else 0
        self.members: set[str] | None = None  # that are tagged; None is unknown
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
            SweepError: If there are none yet, and MLflow does not take any.
        """
        uri, directory, name = sweep.tracking, sweep.directory, sweep.name
        store = uri or local_uri(directory)
        notes = Journal(directory / RUNS, may_write)
        try:
            client = mlflow_client(store)
            if noted := notes.read():
                return cls(client, notes, noted, sweep, dense, earlier)
            experiment = client.get_experiment_by_name(name)
            identity = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(name, artifacts_beside(store), tags=_KIND)
            )
            for key, value in view_tags(_now()).items():
                client.set_experiment_tag(identity, key, value)
            parent = client.create_run(identity, run_name=name, tags={"sweep": name}).info.run_id
            client.log_text(parent, sweep_toml(sweep), "sweep.toml")
            client.log_batch(parent, params=[Param(k, v) for k, v in sweep_params(sweep).items()])
        except (MlflowException, OSError) as error:
            raise SweepError(
                f"tracking = {uri!r}: {first_line(error)}; give a server that runs"
            ) from error
        first = {"experiment": identity, "parent": parent}
        notes.append(first)
        return cls(client, notes, [first], sweep, dense, earlier)

    def log(self, event: Event, place: int) -> None:
        """Log an event of the ledger, which goes on at a place behind it."""
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
        self._mark(front)
        self.page.show(front, records, self._links())

    def close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the final front, with what was measured on test, and close the parent run."""
        for member in (*front.members, front.dense):
            if member.test_top1 is not None:
                metric = Metric("test_top1", member.test_top1, _now(), 0)
                self._log_once(self.trials[member.trial], [metric])
        self._mark(front)
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
        """Log what methods learned before the trials: a table, and the seconds that it took."""
        self.client.log_dict(self.parent, {"runs": event["runs"]}, "learned.json")
        self.page.draw_learned()
        seconds = sum(run["report"]["seconds"] for run in event["runs"])
        metric = Metric("learning_seconds", seconds, event["time"], 0)
        self._log_once(self.parent, [metric])

    def _elastic(self, event: Event) -> None:
        """Log what came of the elastic start."""
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
        """Return the run that a trial has in MLflow, noted or not."""
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

    def _mark(self, front: Front) -> None:
        """Tag what is a member now and what is none any more."""
        if self.members is None:
            filter_ = f"tags.`mlflow.parentRunId` = '{self.parent}' AND tags.front = 'true'"
            found = self.client.search_runs([self.experiment], filter_, max_results=_MOST_RUNS)
            self.members = {run.data.tags["trial"] for run in found}
        members = {member.trial for member in front.members}
        for trial in sorted(members ^ self.members):
            value = "true" if trial in members else "false"
            self.client.set_tag(self.trials[trial], "front", value)
            self.members = self.members ^ {trial}


def first_line(error: Exception) -> str:
    """Return the first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _now() -> int:
    """Milliseconds, as MLflow counts time."""
    return int(time.time() * 1000)


def local_uri(directory: Path) -> str:
    """Return the tracking URI of the database in a sweep's directory."""
    return f"{SQLITE}{directory.resolve() / 'mlflow.db'}"


def ui_command(uri: str | None, directory: Path) -> str:
    """Return what opens the MLflow UI on a sweep: a command, or a server's address."""
    if uri is not None and uri.startswith("http"):
        return uri
    here = os.path.relpath(Path(sys.executable).with_name("mlflow"))  # not everyone activates
    program = "mlflow" if shutil.which("mlflow") else here
    return f"{program} ui --backend-store-uri {uri or f'{SQLITE}{directory}/mlflow.db'}"


def page_address(sweep: Sweep) -> str:
    """Return where MLflow's page shows a sweep that has been logged.

    A database is shown by whoever starts MLflow on it, on the port that it takes by default.
    """
    first = Journal(sweep.directory / RUNS).read()[0]
    here = sweep.tracking is None or not sweep.tracking.startswith("http")
    server = "http://127.0.0.1:5000" if here else str(sweep.tracking).rstrip("/")
    run = f"#/experiments/{first['experiment']}/runs/{first['parent']}"
    return f"{server}/{run}?workflowType=machine_learning"


def sweep_params(sweep: Sweep) -> dict[str, str]:
    """Return what is searched, as the parent run's parameters."""
    data = sweep.data
    return {
        "model": str(sweep.model.path or sweep.model.name),
        "train": data.train,
        "val": data.val,
        "test": data.test,
        "steps": ", ".join(sweep.labels),
        "budget": f"{sweep.budget.low} to {sweep.budget.high}",
        "cost": sweep.cost,
        "trials": str(sweep.trials),
        "epochs": str(sweep.epochs),
        "sampler": sweep.sampler,
        "seed": str(sweep.seed),
    }


def trial_params(record: TrialRecord) -> dict[str, str]:
    """Return what tells trials apart in MLflow's table: methods and mean shares."""
    params = {"methods": record.methods, "origin": record.origin, "plan": record.plan_line[:500]}
    params["cost_ratio"] = f"{record.cost_ratio:.4f}"
    for step in record.plan["steps"]:
        kinds: dict[str, list[float]] = {}
        for site, share in step["thresholds"].items():
            parts = site.split(".")
            kinds.setdefault(".".join(parts[2:]) or site, []).append(share)
        for kind, shares in kinds.items():
            params[f"{step['method']}.{kind}.mean_share"] = f"{fmean(shares):.4f}"
    return params


def change_metrics(change: Change) -> list[Metric]:
    """Return what a sweep changed on the front it started from, as metrics."""
    values = {
        "hypervolume_before": change.before,
        "hypervolume_after": change.after,
        "points_gained": len(change.gained),
        "points_lost": len(change.lost),
    }
    return [Metric(key, float(value), _now(), 0) for key, value in values.items()]
