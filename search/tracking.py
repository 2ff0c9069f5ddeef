"""MLflow: a parent run per sweep, a child run per trial. Only the driver writes."""

from __future__ import annotations

import logging
import math
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

from search.background import Background
from search.journal import Journal
from search.pictures import front_html, front_png, kept_png
from search.progress import cost_ratio, front_line, top1_text
from search.results import Front, TrialRecord, front_json

RUNS = "mlflow.jsonl"
"""File of a sweep's directory that says which MLflow runs are its own: first the sweep's."""

REDRAW_S, REST = 60.0, 19.0
"""Seconds for which the pictures of a changing front stay as they are, and multiples of the time
that drawing them took: the page alone has 5 MB, and more with each trial.
"""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # metrics first, in the UI
_STATUS = {"finished": "FINISHED", "dense": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100  # that MLflow takes in one batch
_MOST_RUNS = 50_000  # that MLflow returns in one answer


class Tracker:
    """Writes one sweep to MLflow.

    A trial does not wait for a database or a server: what is logged while trials run is written on
    a thread of its own, in order. `wait` returns when it is there.
    """

    def __init__(self, client: MlflowClient, directory: Path, lines: Sequence[dict]) -> None:
        """Use `open` instead."""
        self.client, self.directory = client, directory
        self.notes = Journal(directory / RUNS)
        self.experiment, self.parent = lines[0]["experiment"], lines[0]["parent"]
        self.trials: dict[str, str] = {line["trial"]: line["run"] for line in lines[1:]}
        self.members: set[str] = set()
        self.redraw = -math.inf
        self.background = Background()

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
        notes = Journal(directory / RUNS)
        if noted := notes.read():
            tracker = cls(client, directory, noted)
            tracker._go_on()
            return tracker
        experiment = client.get_experiment_by_name(name)
        where = None if uri else (directory / "mlartifacts").resolve().as_uri()
        identity = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(name, where, tags=_KIND)
        )
        parent = client.create_run(identity, run_name=name, tags={"sweep": name}).info.run_id
        first = {"experiment": identity, "parent": parent}
        notes.append(first)
        client.log_text(parent, sweep_toml, "sweep.toml")
        return cls(client, directory, [first])

    def wait(self) -> None:
        """Return when all that was logged is written.

        Raises:
            Exception: What MLflow raised while it was written; from then on, from every call.
        """
        self.background.wait()

    def learned(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Log what methods learned before the trials: a table, and the seconds that it took."""
        self.client.log_dict(self.parent, {"runs": list(runs)}, "learned.json")
        seconds = sum(run["report"]["seconds"] for run in runs)
        metric = Metric("learning_seconds", seconds, _now(), 0)
        self.client.log_batch(self.parent, metrics=[metric])

    def elastic(self, run: Mapping[str, Any]) -> None:
        """Log what came of the elastic start."""
        self.client.log_dict(self.parent, dict(run), "elastic.json")

    def start_trial(self, record: TrialRecord) -> None:
        """Open a child run.

        A trial that is opened a second time was lost with the driver that ran it, and starts anew,
        perhaps with another plan: its old run goes.
        """
        self.background.call(self._start_trial, record, _now())

    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an epoch in one batch."""
        now = _now()
        batch = [Metric(key, value, now, epoch) for key, value in metrics.items()]
        self.background.call(self._log_batch, trial, batch)

    def finish_trial(self, record: TrialRecord) -> None:
        """Close a child run."""
        self.background.call(self._finish_trial, record, _now())

    def front_grew(self, front: Front, ended: int) -> None:
        """Log the hypervolume after `ended` trials."""
        now = _now()
        metrics = [
            Metric("hypervolume", front.hypervolume, now, ended),
            Metric("front_size", len(front.members), now, ended),
        ]
        self.background.call(self.client.log_batch, self.parent, metrics)

    def update_front(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the front if its members changed."""
        self.background.call(self._update_front, front, records)

    def close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Log the final front, with what was measured on test, and close the parent run."""
        self.background.call(self._close, front, records)
        self.wait()

    def _start_trial(self, record: TrialRecord, now: int) -> None:
        if lost := self.trials.get(record.trial):
            self.client.delete_run(lost)
            self.members.discard(record.trial)
        tags = {
            "mlflow.parentRunId": self.parent,
            "trial": record.trial,
            "origin": record.origin,
            "of": record.of,
            "methods": record.methods,
            "status": "running",
            "front": "false",
        }
        run = self.client.create_run(self.experiment, now, tags, record.name).info.run_id
        self.trials[record.trial] = run
        self.notes.append({"trial": record.trial, "run": run})
        params = [Param(key, value) for key, value in trial_params(record).items()][:_MOST_PARAMS]
        self.client.log_batch(run, params=params)
        self.client.log_dict(run, record.plan, "plan.json")

    def _log_batch(self, trial: str, metrics: Sequence[Metric]) -> None:
        self.client.log_batch(self.trials[trial], metrics)

    def _finish_trial(self, record: TrialRecord, now: int) -> None:
        run = self.trials[record.trial]
        tags = [RunTag("status", record.status), RunTag("reason", record.reason)]
        self.client.log_batch(run, tags=tags)
        self.client.set_terminated(run, _STATUS[record.status], now)

    def _update_front(self, front: Front, records: Sequence[TrialRecord]) -> None:
        if not self._mark(front):
            return
        self._describe(front)
        if time.monotonic() >= self.redraw:
            self._draw(front, records)

    def _mark(self, front: Front) -> bool:
        """Tag what is a member now and what is none any more; say whether anything was."""
        members = {member.trial for member in front.members}
        changed = members ^ self.members
        for trial in changed:
            value = "true" if trial in members else "false"
            self.client.set_tag(self.trials[trial], "front", value)
        self.members = members
        return bool(changed)

    def _describe(self, front: Front) -> None:
        self.client.log_dict(self.parent, front_json(front), "front.json")
        self.client.set_tag(self.parent, "mlflow.note.content", note(front))

    def _draw(self, front: Front, records: Sequence[TrialRecord]) -> None:
        start = time.monotonic()
        self.client.log_text(self.parent, front_html(front, records), "front.html")
        for draw, name in ((front_png, "front.png"), (kept_png, "kept.png")):
            path = self.directory / name
            draw(front, records, path)
            self.client.log_artifact(self.parent, str(path))
        end = time.monotonic()
        self.redraw = end + max(REDRAW_S, REST * (end - start))

    def _close(self, front: Front, records: Sequence[TrialRecord]) -> None:
        now = _now()
        for member in front.members:
            if member.test_top1 is not None:
                metric = Metric("test_top1", member.test_top1, now, 0)
                self._log_batch(member.trial, [metric])
        self._mark(front)
        self._describe(front)
        self._draw(front, records)
        self.client.set_terminated(self.parent, "FINISHED")

    def _go_on(self) -> None:
        """Delete child runs that a driver could not note before it was killed; find the front."""
        filter_ = f"tags.`mlflow.parentRunId` = '{self.parent}'"
        found = self.client.search_runs([self.experiment], filter_, max_results=_MOST_RUNS)
        noted = set(self.trials.values())
        for run in found:
            if run.info.run_id not in noted:
                self.client.delete_run(run.info.run_id)
            elif run.data.tags["front"] == "true":
                self.members.add(run.data.tags["trial"])


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
