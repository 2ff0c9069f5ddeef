"""MLflow: a parent run per sweep, a child run per trial. Only the driver writes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from search.pictures import front_html, front_png, kept_png
from search.progress import cost_ratio, front_line, top1_text
from search.results import Front, TrialRecord, front_json

RUNS = "mlflow.json"
"""File of a sweep's directory that says which MLflow runs are its own."""

REDRAW_S = 60.0
"""Pictures of a changing front are drawn at most this often: the page alone has 5 MB."""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # metrics first, in the UI
_STATUS = {"finished": "FINISHED", "dense": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100  # that MLflow takes in one batch
_MOST_RUNS = 50_000  # that MLflow returns in one answer


class Tracker:
    """Writes one sweep to MLflow."""

    def __init__(self, client: MlflowClient, directory: Path, runs: dict[str, Any]) -> None:
        """Use `open` instead."""
        self.client, self.directory, self.runs = client, directory, runs
        self.members: set[str] | None = None  # unknown to a driver that goes on where one ended
        self.drawn = 0.0

    @classmethod
    def open(cls, uri: str | None, directory: Path, name: str, sweep_toml: str) -> Tracker:
        """Open the runs of a sweep: those that its directory names, or new ones.

        Args:
            uri: MLflow tracking URI; None is SQLite in the sweep's directory.
            directory: The sweep's directory; it exists.
            name: Name of the experiment and the parent run.
            sweep_toml: The sweep as run, kept as an artifact.
        """
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri or local_uri(directory))
        noted = directory / RUNS
        if noted.exists():
            tracker = cls(client, directory, json.loads(noted.read_text()))
            tracker._delete_unnoted()
            return tracker
        experiment = client.get_experiment_by_name(name)
        where = None if uri else (directory / "mlartifacts").resolve().as_uri()
        identity = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(name, where, tags=_KIND)
        )
        parent = client.create_run(identity, run_name=name, tags={"sweep": name}).info.run_id
        tracker = cls(client, directory, {"experiment": identity, "parent": parent, "trials": {}})
        tracker._note_runs()
        client.log_text(parent, sweep_toml, "sweep.toml")
        return tracker

    def learned(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Log what methods learned before the trials: a table, and the seconds that it took."""
        parent = self.runs["parent"]
        self.client.log_dict(parent, {"runs": list(runs)}, "learned.json")
        now, seconds = int(time.time() * 1000), sum(run["report"]["seconds"] for run in runs)
        self.client.log_batch(parent, metrics=[Metric("learning_seconds", seconds, now, 0)])

    def elastic(self, run: Mapping[str, Any]) -> None:
        """Log what came of the elastic start."""
        self.client.log_dict(self.runs["parent"], dict(run), "elastic.json")

    def start_trial(self, record: TrialRecord) -> None:
        """Open a child run.

        A trial that is opened a second time was lost with the driver that ran it, and starts anew,
        perhaps with another plan: its old run goes.
        """
        if lost := self.runs["trials"].get(record.trial):
            self.client.delete_run(lost)
        tags = {
            "mlflow.parentRunId": self.runs["parent"],
            "trial": record.trial,
            "origin": record.origin,
            "of": record.of,
            "methods": record.methods,
            "status": "running",
            "front": "false",
        }
        run = self.client.create_run(self.runs["experiment"], run_name=record.name, tags=tags)
        self.runs["trials"][record.trial] = run.info.run_id
        self._note_runs()
        params = [Param(key, value) for key, value in trial_params(record).items()][:_MOST_PARAMS]
        self.client.log_batch(run.info.run_id, params=params)
        self.client.log_dict(run.info.run_id, record.plan, "plan.json")

    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an epoch in one batch."""
        now = int(time.time() * 1000)
        batch = [Metric(key, value, now, epoch) for key, value in metrics.items()]
        self.client.log_batch(self.runs["trials"][trial], metrics=batch)

    def finish_trial(self, record: TrialRecord) -> None:
        """Close a child run."""
        run = self.runs["trials"][record.trial]
        tags = [RunTag("status", record.status), RunTag("reason", record.reason)]
        self.client.log_batch(run, tags=tags)
        self.client.set_terminated(run, _STATUS[record.status])

    def update_front(self, front: Front, records: Sequence[TrialRecord], ended: int) -> None:
        """Log the hypervolume after `ended` trials and, if the front changed, its members."""
        now = int(time.time() * 1000)
        metrics = [
            Metric("hypervolume", front.hypervolume, now, ended),
            Metric("front_size", len(front.members), now, ended),
        ]
        self.client.log_batch(self.runs["parent"], metrics=metrics)
        members = {member.trial for member in front.members}
        if members == self.members:
            return
        known = set(self.runs["trials"])
        for trial in known if self.members is None else members ^ self.members:
            value = "true" if trial in members else "false"
            self.client.set_tag(self.runs["trials"][trial], "front", value)
        self.members = members
        self.client.log_dict(self.runs["parent"], front_json(front), "front.json")
        self.client.set_tag(self.runs["parent"], "mlflow.note.content", note(front))
        if time.monotonic() - self.drawn >= REDRAW_S:
            self.draw(front, records)

    def draw(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the pictures of the front."""
        self.drawn = time.monotonic()
        parent = self.runs["parent"]
        self.client.log_text(parent, front_html(front, records), "front.html")
        for draw, name in ((front_png, "front.png"), (kept_png, "kept.png")):
            path = self.directory / name
            draw(front, records, path)
            self.client.log_artifact(parent, str(path))

    def close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the final front, with what was measured on test, and close the parent run."""
        parent = self.runs["parent"]
        for member in front.members:
            if member.test_top1 is not None:
                self.client.log_metric(
                    self.runs["trials"][member.trial], "test_top1", member.test_top1
                )
        self.client.log_dict(parent, front_json(front), "front.json")
        self.client.set_tag(parent, "mlflow.note.content", note(front))
        self.draw(front, records)
        self.client.set_terminated(parent, "FINISHED")

    def _delete_unnoted(self) -> None:
        """Delete child runs that a driver opened and was killed before it could note them."""
        filter_ = f"tags.`mlflow.parentRunId` = '{self.runs['parent']}'"
        found = self.client.search_runs([self.runs["experiment"]], filter_, max_results=_MOST_RUNS)
        for run in {run.info.run_id for run in found} - set(self.runs["trials"].values()):
            self.client.delete_run(run)

    def _note_runs(self) -> None:
        temporary = self.directory / f".{RUNS}.{os.getpid()}"
        temporary.write_text(json.dumps(self.runs))
        os.replace(temporary, self.directory / RUNS)


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
