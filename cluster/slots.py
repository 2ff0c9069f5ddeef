"""What became of the slots of schedules: in the tracking store, where every machine sees it.

The name of an MLflow experiment is unique in its database. So creating the experiment of a slot's
run is what claims the slot: of all that try, at the same moment or later, one succeeds. The run
then finds the experiment and logs into it. The rest is in the experiment's tags.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import Literal

from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from cluster.schedules import Claim, Record, Schedule, run_name, stamp, unstamp
from search.sweep import PASSWORD, SQLITE, SweepError, artifacts_beside, sqlite_file

TAG = "prunefront."
"""What the tags of a slot's experiment begin with."""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # as search.tracking.run_ids gives it
_RECENT = 100  # experiments of which the last slot is one: all, unless somebody makes more at once


class Slots:
    """The record of slots in one tracking store.

    Attributes:
        uri: Tracking URI, which the runs of the slots log to as well.
    """

    def __init__(self, uri: str, host: str | None = None) -> None:
        """Use a tracking store.

        Args:
            uri: Of a server or a database; SQLite if there is only one machine.
            host: Name of this machine, kept with what it claims; None is what the system says.

        Raises:
            SweepError: If two machines could claim the same slot there, or a password is in it.
            ConnectionError: If it does not answer.
        """
        if "://" not in uri or uri.startswith("file:"):
            raise SweepError(
                f"tracking is {uri!r}, where a slot could be claimed twice; "
                "give a server, http://..., or on a single machine sqlite:///..."
            )
        if PASSWORD.search(uri):
            raise SweepError(
                "tracking holds a password, which all who see the jobs would see; give it as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, here and on the nodes"
            )
        if file := sqlite_file(uri):  # absolute: a job has another working directory
            uri = f"{SQLITE}{file}"
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # Who asks asks again in a minute, and must not wait for minutes until then.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self.uri, self.host = uri, host or socket.gethostname()
        with self._answers():
            self._client = MlflowClient(tracking_uri=uri)

    def record(self, schedule: Schedule) -> Record:
        """Return what became of a schedule's slots."""
        with self._answers():
            recent = list(islice(self._experiments(schedule), _RECENT))
        claims = [_claim(experiment) for experiment in recent]
        return Record(
            last=max(claims, key=lambda claim: claim.slot, default=None),
            skipped=_marked(recent, "skipped"),
            waiting=_marked(recent, "waiting"),
        )

    def claim(self, schedule: Schedule, slot: datetime, now: datetime) -> Claim | None:
        """Claim a slot; None if it is another's.

        Raises:
            SweepError: If there is an experiment of that name which is no slot's.
        """
        name = run_name(schedule, slot)
        tags = {
            TAG + "schedule": schedule.name,
            TAG + "slot": stamp(slot),
            TAG + "state": "claimed",
            TAG + "job": name,
            TAG + "clock": schedule.clock,
            TAG + "claimed_at": now.isoformat(),
            TAG + "claimed_by": self.host,
        }
        with self._answers():
            try:
                self._client.create_experiment(name, artifacts_beside(self.uri), tags=_KIND | tags)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                self._refuse_strangers(schedule, name)
                return None
            return _claim(self._client.get_experiment_by_name(name))

    def renew(self, claim: Claim, now: datetime) -> None:
        """Note that this machine submits what another claimed and did not submit."""
        self._tag(claim, claimed_at=now.isoformat(), claimed_by=self.host)

    def confirm(self, claim: Claim, now: datetime) -> None:
        """Note that a slot was submitted."""
        tags = {"submitted_at": now.isoformat(), "submitted_by": self.host}
        self._tag(claim, **tags, state="submitted")  # the state last, for it counts

    def mark(
        self, last: Claim, slot: datetime, what: Literal["skipped", "waiting"], now: datetime
    ) -> None:
        """Note of a slot, at the run that it meets, that it does not run now.

        A tag per slot: of several machines that write at once none overwrites a later slot.
        """
        self._tag(last, **{f"{what}.{stamp(slot)}": now.isoformat()})

    def last_finished(self, schedule: Schedule) -> str | None:
        """Return the name of the last run that finished; None if there is none."""
        with self._answers():
            for experiment in self._experiments(schedule):
                finished = f"tags.sweep = '{experiment.name}' AND attributes.status = 'FINISHED'"
                if experiment.lifecycle_stage == "active" and self._client.search_runs(
                    [experiment.experiment_id], finished, max_results=1
                ):
                    return str(experiment.name)
        return None

    def _experiments(self, schedule: Schedule) -> Iterator[Experiment]:
        """Yield the experiments of a schedule's runs, last created first; deleted ones count.

        They are ordered by id, which a clock that is put back does not turn round.
        """
        token = None
        while True:
            page = self._client.search_experiments(
                view_type=ViewType.ALL,
                max_results=_RECENT,
                filter_string=f"tags.`{TAG}schedule` = '{schedule.name}'",
                order_by=["experiment_id DESC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _refuse_strangers(self, schedule: Schedule, name: str) -> None:
        found = self._client.get_experiment_by_name(name)
        if found and found.tags.get(TAG + "schedule") != schedule.name:
            raise SweepError(
                f"experiment {name!r} exists and is no slot of {schedule.name!r}; "
                "rename the experiment or the schedule"
            )

    def _tag(self, claim: Claim, **tags: str) -> None:
        with self._answers():
            for key, value in tags.items():
                try:
                    self._client.set_experiment_tag(claim.experiment, TAG + key, value)
                except MlflowException:
                    # Of two that write a new tag at once MLflow refuses one (a unique key), which
                    # may overwrite it then.
                    self._client.set_experiment_tag(claim.experiment, TAG + key, value)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConnectionError(f"tracking is {self.uri!r}, which answers: {first}") from error


def _claim(experiment: Experiment) -> Claim:
    tags = experiment.tags
    deleted = experiment.lifecycle_stage != "active"
    return Claim(
        slot=unstamp(tags[TAG + "slot"]),
        name=experiment.name,
        experiment=experiment.experiment_id,
        # What was deleted before it was submitted is not wanted; its tags cannot change any more.
        submitted=tags[TAG + "state"] == "submitted" or deleted,
        at=datetime.fromisoformat(tags[TAG + "claimed_at"]),
        host=tags[TAG + "claimed_by"],
        clock=tags[TAG + "clock"],
        deleted=deleted,
    )


def _marked(experiments: list[Experiment], what: str) -> frozenset[datetime]:
    start = f"{TAG}{what}."
    return frozenset(
        unstamp(key.removeprefix(start))
        for experiment in experiments
        for key in experiment.tags
        if key.startswith(start)
    )
