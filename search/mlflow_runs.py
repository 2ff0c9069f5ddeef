"""MLflow: a parent run per sweep, a child run per trial, and what is logged to them."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search.change import Change, change
from search.journal import Journal
from search.ledger import METRICS, Event, new_record
from search.mlflow_client import mlflow_client
from search.pictures import front_html, front_png, kept_png
from search.progress import cost_ratio, front_line, top1_text
from search.results import Front, TrialRecord, front_json
from search.sweep import SweepError

RUNS = "mlflow.jsonl"
"""File of a sweep's directory that says which MLflow runs are its own, first the sweep's, and how
far the ledger has been logged.
"""

REDRAW_S, REST = 60.0, 19.0
"""Seconds for which the pictures of a changing front stay as they are, and multiples of the time
that drawing them took: the page alone has 5 MB, and more with each trial.
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
        self, client: MlflowClient, notes: Journal, lines: Sequence[dict], earlier: Front | None
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
        self.shown: set[str] | None = None  # that the note and the pictures show
        self.redraw, self.again = -math.inf, True

    @classmethod
    def open(
        cls,
        uri: str | None,
        directory: Path,
        name: str,
        sweep_toml: str,
        may_write: Callable[[], None] = lambda: None,
        earlier: Front | None = None,
    ) -> SweepRuns:
        """Open the runs of a sweep: those that its directory names, or new ones.

        Args:
            uri: MLflow tracking URI; None is SQLite in the sweep's directory.
            directory: The sweep's directory; it exists.
            name: Name of the experiment and the parent run.
            sweep_toml: The sweep as run, kept as an artifact.
            may_write: Asked before anything is logged; it raises an error if this must not be.
            earlier: The front that the sweep starts from, if it does.

        Raises:
            SweepError: If there are none yet, and MLflow does not take any.
        """
        notes = Journal(directory / RUNS, may_write)
        try:
            client = mlflow_client(uri or local_uri(directory))
            if noted := notes.read():
                return cls(client, notes, noted, earlier)
            experiment = client.get_experiment_by_name(name)
            where = None if uri else (directory / "mlartifacts").resolve().as_uri()
            identity = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(name, where, tags=_KIND)
            )
            parent = client.create_run(identity, run_name=name, tags={"sweep": name}).info.run_id
            client.log_text(parent, sweep_toml, "sweep.toml")
        except (MlflowException, OSError) as error:
            raise SweepError(
                f"tracking = {uri!r}: {first_line(error)}; give a server that runs"
            ) from error
        first = {"experiment": identity, "parent": parent}
        notes.append(first)
        return cls(client, notes, [first], earlier)

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
        """Show a front, if its members changed: tags, a note, and now and then pictures."""
        self._mark(front)
        if self.members == self.shown:
            return
        self._describe(front)
        if time.monotonic() >= self.redraw:
            self._draw(front, records)
        self.shown = self.members

    def close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the final front, with what was measured on test, and close the parent run."""
        for member in front.members:
            if member.test_top1 is not None:
                metric = Metric("test_top1", member.test_top1, _now(), 0)
                self._log_once(self.trials[member.trial], [metric])
        self._mark(front)
        self._describe(front)
        self._draw(front, records)
        if self.earlier is not None:
            self._log_once(self.parent, change_metrics(change(self.earlier, front)))
        self.client.set_terminated(self.parent, "FINISHED")

    def _learned(self, event: Event) -> None:
        """Log what methods learned before the trials: a table, and the seconds that it took."""
        self.client.log_dict(self.parent, {"runs": event["runs"]}, "learned.json")
        seconds = sum(run["report"]["seconds"] for run in event["runs"])
        metric = Metric("learning_seconds", seconds, event["time"], 0)
        self._log_once(self.parent, [metric])

    def _elastic(self, event: Event) -> None:
        """Log what came of the elastic start."""
        self.client.log_dict(self.parent, event["run"], "elastic.json")

    def _start_trial(self, event: Event) -> None:
        record = new_record(event["config"])
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
        result = event["result"]
        metrics = [
            Metric(key, float(result[key]), event["time"], result["epoch"]) for key in METRICS
        ]
        self._log_once(self.trials[result["trial"]], metrics)

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

    def _describe(self, front: Front) -> None:
        self.client.log_dict(self.parent, front_json(front), "front.json")
        text = note(front)
        if self.earlier is not None:
            text += (
                f"\n\nAgainst the front it started from: {change(self.earlier, front).describe()}"
            )
        self.client.set_tag(self.parent, "mlflow.note.content", text)

    def _draw(self, front: Front, records: Sequence[TrialRecord]) -> None:
        start = time.monotonic()
        self.client.log_text(self.parent, front_html(front, records), "front.html")
        for draw, name in ((front_png, "front.png"), (kept_png, "kept.png")):
            path = self.directory / name
            draw(front, records, path)
            self.client.log_artifact(self.parent, str(path))
        end = time.monotonic()
        self.redraw = end + max(REDRAW_S, REST * (end - start))


def first_line(error: Exception) -> str:
    """Return the first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _now() -> int:
    """Milliseconds, as MLflow counts time."""
    return int(time.time() * 1000)


def local_uri(directory: Path) -> str:
    """Return the tracking URI of the database in a sweep's directory."""
    return f"sqlite:///{directory.resolve() / 'mlflow.db'}"


def ui_command(uri: str | None, directory: Path) -> str:
    """Return what opens the MLflow UI on a sweep: a command, or a server's address."""
    if uri is not None and uri.startswith("http"):
        return uri
    here = os.path.relpath(Path(sys.executable).with_name("mlflow"))  # not everyone activates
    program = "mlflow" if shutil.which("mlflow") else here
    return f"{program} ui --backend-store-uri {uri or f'sqlite:///{directory}/mlflow.db'}"


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


def note(front: Front) -> str:
    """Return the front as Markdown."""
    lines = [
        f"Front of validation top-1 against {front.cost}: {front_line(front)}",
        "",
        "| trial | val top-1 | test top-1 | epochs | cost | GMACs | effective | params | plan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in (*front.members, front.dense):
        test = f"{record.test_top1:.1f}" if record.test_top1 is not None else ""
        ratio = f"{cost_ratio(front, record):.2f}x"
        cells = [
            record.name,
            top1_text(record),
            test,
            str(record.epochs),
            ratio,
            f"{record.gmacs:.4g}",
            f"{record.effective_gmacs:.4g}",
            f"{record.params:,}",
            record.plan_line,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
