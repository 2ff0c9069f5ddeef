"""Submits what is due: the glue between schedules, their record, and the cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.table import Table

from cluster.jobs import JobExistsError
from cluster.schedules import (
    GRACE,
    Claim,
    Decision,
    Record,
    Schedule,
    choose,
    coming,
    run_name,
)
from cluster.slots import Slots
from cluster.upload import refuse_what_stays_behind
from search.sweep import SweepError, load_sweep

MOST_ROWS = 50
"""Slots of a schedule that are printed."""


class Cluster(Protocol):
    """What runs the sweeps."""

    def submit(self, path: Path, overrides: Sequence[str], *, job: str) -> object:
        """Check a sweep and submit it.

        Args:
            path: TOML file of the sweep.
            overrides: `KEY=VALUE`, later ones win.
            job: Id of the job. The cluster takes each only once.

        Raises:
            SweepError: If the sweep is wrong.
            JobExistsError: If the cluster has seen the id before.
            ConnectionError: If the cluster does not answer.
        """

    def state(self, job: str) -> str | None:
        """Return "running" (or about to), "ended", or None if the cluster does not know the job.

        Raises:
            ConnectionError: If the cluster does not answer.
        """


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of all schedules."""

    submitted: tuple[str, ...] = ()  # names of runs
    failed: tuple[str, ...] = ()  # names of schedules

    @property
    def exit_code(self) -> int:
        """1 if any schedule failed."""
        return 1 if self.failed else 0


def due(
    schedules: Sequence[Schedule], slots: Slots, cluster: Cluster, now: datetime, stream: TextIO
) -> Outcome:
    """Submit what is due, and say what was done. What goes wrong is said in a line.

    Args:
        schedules: The schedules; what is wrong with one does not keep the others.
        slots: What became of their slots.
        cluster: What runs the sweeps.
        now: The time.
        stream: Where it is said.
    """
    call = _Call(slots=slots, cluster=cluster, now=now, stream=stream)
    return _each(schedules, call.act, stream)


def dry_run(
    schedules: Sequence[Schedule], slots: Slots, cluster: Cluster, now: datetime, stream: TextIO
) -> Outcome:
    """Say what `due` would do and why, and what is to come. Nothing is submitted or noted."""
    call = _Call(slots=slots, cluster=cluster, now=now, stream=stream)
    outcome = _each(schedules, call.foretell, stream)
    show_coming(schedules, now, stream)
    return outcome


def show_coming(
    schedules: Sequence[Schedule], now: datetime, stream: TextIO, days: int = 7
) -> None:
    """Print the slots of the coming days."""
    rows = coming(schedules, now, days)
    if not rows:
        print(f"no slot in the coming {days} days", file=stream)
        return
    title = f"Slots of the coming {days} days"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for header in ("local time", "UTC", "schedule", "sweep"):
        table.add_column(header, no_wrap=header != "sweep")
    counts: Counter[str] = Counter()
    for row in rows:
        name = row.schedule.name
        counts[name] += 1
        if counts[name] <= MOST_ROWS:
            local = f"{row.local:%a %Y-%m-%d %H:%M %Z}"
            table.add_row(local, f"{row.slot:%m-%d %H:%M}", name, str(row.schedule.sweep))
    width = None if stream.isatty() else 100
    Console(file=stream, width=width, highlight=False).print(table)
    for name, count in counts.items():
        if count > MOST_ROWS:
            print(f"and {count - MOST_ROWS} more of {name}", file=stream)


def _each(
    schedules: Sequence[Schedule], act: Callable[[Schedule], str | None], stream: TextIO
) -> Outcome:
    submitted, failed = [], []
    for schedule in schedules:
        try:
            name = act(schedule)
        except (SweepError, ConnectionError) as error:
            print(f"error: {schedule.name}: {error}", file=stream)
            failed.append(schedule.name)
        else:
            submitted += [name] if name else []
    return Outcome(submitted=tuple(submitted), failed=tuple(failed))


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What is known about a schedule, and what is to be done."""

    schedule: Schedule
    record: Record
    job: str | None  # what the cluster says of the last run's job, where that matters
    decision: Decision

    @property
    def slot(self) -> datetime:
        assert self.decision.slot is not None
        return self.decision.slot

    @property
    def run_name(self) -> str:
        return run_name(self.schedule, self.slot)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `due`."""

    slots: Slots
    cluster: Cluster
    now: datetime
    stream: TextIO

    def act(self, schedule: Schedule) -> str | None:
        """Do what is to be done; return the run that was submitted."""
        look = self._look(schedule)
        last, action = look.record.last, look.decision.action
        if last and not last.submitted and look.job is not None:
            self.slots.confirm(last, self.now)  # who claimed it died after it had submitted it
        if action == "run":
            return self._run(look)
        if action == "again" and last:
            return self._again(look, last)
        if action == "skip" and last:
            self._mark(look, last, "skipped")
        if action == "wait" and last and look.slot not in look.record.waiting:
            self._mark(look, last, "waiting")
        return None

    def foretell(self, schedule: Schedule) -> None:
        """Say what would be done."""
        look = self._look(schedule)
        decision = look.decision
        if decision.action in ("run", "again"):
            self._overrides(look)  # raises if the sweep is wrong
        name = f" {look.run_name}" if decision.slot else ""
        print(f"{schedule.name}: would {decision.action}{name}: {decision.why}", file=self.stream)

    def _look(self, schedule: Schedule) -> _Look:
        record, job = self.slots.record(schedule), None
        if record.seen and record.seen > self.now + GRACE:
            raise SweepError(
                f"the record goes to {record.seen:%Y-%m-%d %H:%M} UTC and the clock says "
                f"{self.now:%Y-%m-%d %H:%M}; nothing runs until then: set the clock right, or, "
                "if it was wrong then, delete that slot's experiment for good (mlflow gc)"
            )
        decision = choose(schedule, record, job, self.now)
        # The cluster is asked only where its answer matters: most calls find nothing due.
        if record.last and (decision.slot or not record.last.submitted):
            job = self.cluster.state(record.last.name)
            decision = choose(schedule, record, job, self.now)
        return _Look(schedule=schedule, record=record, job=job, decision=decision)

    def _run(self, look: _Look) -> str | None:
        overrides = self._overrides(look)
        self.cluster.state(look.run_name)  # raises, if it does not answer, before it is claimed
        claim = self.slots.claim(look.schedule, look.slot, self.now)
        if claim is None:
            return None
        # A machine whose clock is behind may have decided before another one claimed a later slot.
        last = self.slots.record(look.schedule).last
        if last and last.slot > claim.slot:
            self._say(look, "left out", f"{last.name} was claimed meanwhile")
            return None
        return self._submit(look, claim, overrides)

    def _again(self, look: _Look, claim: Claim) -> str | None:
        overrides = self._overrides(look)
        self.slots.renew(claim, self.now)
        return self._submit(look, claim, overrides)

    def _submit(self, look: _Look, claim: Claim, overrides: Sequence[str]) -> str | None:
        try:
            self.cluster.submit(look.schedule.sweep, overrides, job=claim.name)
        except JobExistsError:
            self.slots.confirm(claim, self.now)
            self._say(look, "had been submitted", "the cluster knows the job")
            return None
        self.slots.confirm(claim, self.now)
        self._say(look, "submitted", look.decision.why)
        return claim.name

    def _mark(self, look: _Look, last: Claim, what: Literal["skipped", "waiting"]) -> None:
        if last.deleted:
            raise SweepError(
                f"experiment {last.name!r} is deleted in MLflow while its job is running, so that "
                f"{look.run_name} cannot be noted as {what}; restore it, or stop the job"
            )
        self.slots.mark(last, look.slot, what, self.now)
        self._say(look, what, look.decision.why)

    def _say(self, look: _Look, what: str, why: str) -> None:
        print(f"{look.run_name} {what}: {why}", file=self.stream)

    def _overrides(self, look: _Look) -> list[str]:
        """Return the overrides of a slot's sweep, if it can be submitted with them.

        Raises:
            SweepError: If it cannot.
        """
        schedule, uri = look.schedule, self.slots.uri
        own = [f'name="{look.run_name}"']
        sweep = load_sweep(schedule.sweep, [*schedule.overrides, *own])
        if sweep.tracking is not None and sweep.tracking.rstrip("/") != uri.rstrip("/"):
            raise SweepError(
                f"{schedule.sweep} has tracking = {sweep.tracking!r}, but slots are recorded in "
                f"{uri!r}; leave tracking out, or give the same"
            )
        refuse_what_stays_behind(sweep)  # now: what is refused later is claimed already
        own.append(f"tracking={_toml(uri)}")
        if sweep.registered_model is None:  # the versions of all slots belong together
            own.append(f"registered_model={_toml(schedule.name)}")
        if schedule.start_from_last and (last := self.slots.last_finished(schedule)):
            own.append(f"start_from={_toml(str(Path(sweep.storage) / last))}")
        return [*schedule.overrides, *own]


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
