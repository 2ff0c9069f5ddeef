"""The record of slots in memory, and what a sweep's driver does to it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Literal

from mlflow.tracking import MlflowClient

from cluster.schedules import Claim, Record, Schedule, run_name
from cluster.slots import Slots


class Memory:
    """The record of slots in memory, of which the tests of `Slots` hold too."""

    def __init__(self, uri: str = "http://memory", host: str = "a", of: Memory | None = None):
        """Of another host, it shares its record."""
        self.uri, self.host = uri, host
        self.claims: dict[str, dict[datetime, Claim]] = of.claims if of else {}
        self.marks: dict[str, dict[str, set[datetime]]] = of.marks if of else {}
        self.finished: set[str] = of.finished if of else set()

    def record(self, schedule: Schedule) -> Record:
        claims = self.claims.get(schedule.name, {})
        marks = self.marks.get(schedule.name, {})
        return Record(
            last=claims[max(claims)] if claims else None,
            skipped=frozenset(marks.get("skipped", ())),
            waiting=frozenset(marks.get("waiting", ())),
        )

    def claim(self, schedule: Schedule, slot: datetime, now: datetime) -> Claim | None:
        claims = self.claims.setdefault(schedule.name, {})
        if slot in claims:
            return None
        claims[slot] = Claim(
            slot=slot,
            name=run_name(schedule, slot),
            experiment=schedule.name,
            submitted=False,
            at=now,
            host=self.host,
            clock=schedule.clock,
        )
        return claims[slot]

    def renew(self, claim: Claim, now: datetime) -> None:
        self._replace(claim, at=now, host=self.host)

    def confirm(self, claim: Claim, now: datetime) -> None:
        self._replace(claim, submitted=True)

    def mark(
        self, last: Claim, slot: datetime, what: Literal["skipped", "waiting"], now: datetime
    ) -> None:
        marks = self.marks.setdefault(last.experiment, {})
        marks.setdefault(what, set()).add(slot)

    def last_finished(self, schedule: Schedule) -> str | None:
        claims = self.claims.get(schedule.name, {})
        names = [claims[slot].name for slot in sorted(claims, reverse=True)]
        return next((name for name in names if name in self.finished), None)

    def _replace(self, claim: Claim, **changes: object) -> None:
        claims = self.claims[claim.experiment]
        claims[claim.slot] = replace(claims[claim.slot], **changes)


def finish(slots: Slots | Memory, name: str, status: str = "FINISHED") -> None:
    """Do what a sweep's driver does, as far as MLflow sees it."""
    if isinstance(slots, Memory):
        slots.finished |= {name} if status == "FINISHED" else set()
        return
    client = MlflowClient(tracking_uri=slots.uri)
    experiment = client.get_experiment_by_name(name)
    parent = client.create_run(experiment.experiment_id, tags={"sweep": name}).info.run_id
    trial = client.create_run(experiment.experiment_id, tags={"mlflow.parentRunId": parent})
    client.set_terminated(trial.info.run_id, "FINISHED")
    client.set_terminated(parent, status)
