"""Schedules of sweeps: which slots they have, and what is to be done now. Pure.

A slot is a moment at which a schedule's sweep begins. Its run is a sweep of its own, named by the
schedule and the slot; so are its results, its MLflow experiment and its job.

At daylight saving it is as with Debian's cron (cronsim does it): what has a fixed hour runs once,
where there is no such hour at its end, where there are two in the first. With `*` at the head of
minute or hour the clock's readings count: `*/30 2 * * *` runs not at all, or four times.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import zoneinfo
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Literal

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from search.sweep import SweepError, problem_line

GRACE = timedelta(minutes=10)
"""Age up to which a slot is on time."""

PATIENCE = timedelta(minutes=5)
"""Time in which a claimed slot is submitted, unless the machine that claimed it died."""


class Schedule(BaseModel):
    """When a sweep runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=80)  # a slot is appended
    cron: str  # minute hour day-of-month month day-of-week
    zone: str  # whose clock the cron line is read by
    sweep: Path  # in TOML relative to the schedules' file
    overrides: tuple[str, ...] = ()  # KEY=VALUE, as for --set
    overlap: Literal["skip", "queue"] = "skip"  # what becomes of a slot while the last run runs
    catch_up: Literal["last", "none"] = "last"  # what runs of the slots that were missed
    start_from_last: bool = False  # from the front of the last run that finished

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
        want = "give minute hour day-of-month month day-of-week, for example '0 2 * * MON'"
        if (count := len(cron.split())) != 5:  # a sixth would be seconds, which slots do not have
            raise ValueError(f"is {cron!r}, with {count} of 5 fields; {want}")
        try:
            first = next(CronSim(cron, datetime(2024, 1, 1, tzinfo=UTC)), None)
        except CronSimError as error:
            field = str(error).removeprefix("Bad ")
            raise ValueError(f"is {cron!r}, whose {field} is wrong; {want}") from error
        if first is None:
            raise ValueError(f"is {cron!r}, which never comes; {want}")
        return cron

    @field_validator("zone")
    @classmethod
    def _is_zone(cls, zone: str) -> str:
        try:
            zoneinfo.ZoneInfo(zone)
        except (KeyError, ValueError, OSError) as error:  # OSError: "Europe" is a directory
            near = difflib.get_close_matches(zone, sorted(zoneinfo.available_timezones()), 1)
            hint = f"did you mean {near[0]!r}?" if near else "give one like 'Europe/Berlin'"
            raise ValueError(f"is {zone!r}, which is no time zone; {hint}") from error
        return zone

    @field_validator("overrides")
    @classmethod
    def _leave_the_name(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        for override in overrides:
            if override.partition("=")[0].strip() == "name":
                raise ValueError(f"has {override!r}; leave the name out, each slot has its own")
        return overrides

    @property
    def clock(self) -> str:
        """Cron line and zone: what says which slots there are."""
        return f"{' '.join(self.cron.split())} {self.zone}"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schedules: tuple[Schedule, ...]

    @field_validator("schedules")
    @classmethod
    def _differ_in_name(cls, schedules: tuple[Schedule, ...]) -> tuple[Schedule, ...]:
        # Some databases and file systems do not tell large letters from small ones.
        counts = Counter(schedule.name.casefold() for schedule in schedules)
        for schedule in schedules:
            if counts[schedule.name.casefold()] > 1:
                raise ValueError(
                    f"has the name {schedule.name!r} twice; give each schedule a name of its own"
                )
        return schedules


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A slot that some machine took, to submit it."""

    slot: datetime
    name: str  # of the run: sweep, experiment and job
    experiment: str  # its id
    submitted: bool  # False is: not known to have been
    at: datetime  # when it was taken, or taken up again
    host: str  # by which machine
    clock: str  # of the schedule then
    deleted: bool = False  # the experiment is in MLflow's bin


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of the slots of a schedule so far."""

    last: Claim | None = None  # of the latest slot
    skipped: frozenset[datetime] = frozenset()
    waiting: frozenset[datetime] = frozenset()

    @property
    def seen(self) -> datetime | None:
        """The latest slot that ran, was skipped, or waits; nothing before it is looked at."""
        ran = {self.last.slot} if self.last else set()
        return max(ran | self.skipped | self.waiting, default=None)

    @property
    def queued(self) -> datetime | None:
        """The slot that waits for the end of the last run."""
        gone = self.skipped | ({self.last.slot} if self.last else set())
        return self.seen if self.seen in self.waiting - gone else None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done now about a schedule.

    `run` claims and submits the slot, `again` submits what was claimed and never confirmed, `skip`
    and `wait` note the slot as that, `rest` does nothing.
    """

    action: Literal["run", "again", "skip", "wait", "rest"]
    slot: datetime | None = None
    why: str


@dataclass(frozen=True, kw_only=True)
class Coming:
    """A slot that is to come."""

    slot: datetime
    schedule: Schedule

    @property
    def local(self) -> datetime:
        """The slot by the schedule's clock."""
        return self.slot.astimezone(zoneinfo.ZoneInfo(self.schedule.zone))


def stamp(slot: datetime) -> str:
    """Return a slot as it stands in names: UTC, so that those of a doubled hour differ."""
    return slot.astimezone(UTC).strftime("%Y%m%dT%H%MZ")


def unstamp(text: str) -> datetime:
    """Return the slot of a stamp."""
    return datetime.fromisoformat(text)


def run_name(schedule: Schedule, slot: datetime) -> str:
    """Return the name of a slot's run."""
    return f"{schedule.name}-{stamp(slot)}"


def slots(schedule: Schedule, after: datetime, until: datetime) -> list[datetime]:
    """Return the slots after one moment, up to and including another, in UTC."""
    zone = zoneinfo.ZoneInfo(schedule.zone)
    # From a midnight on: within a doubled hour cronsim would take the second for the first.
    day = after.astimezone(zone).date() - timedelta(days=1)
    found = []
    for local in CronSim(schedule.cron, datetime.combine(day, time(), zone)):
        slot = local.astimezone(UTC)
        if slot > until:
            break
        if slot > after:
            found.append(slot)
    return found


def latest(schedule: Schedule, after: datetime, until: datetime) -> datetime | None:
    """Return the last slot after one moment, up to and including another; None if there is none."""
    days = 1
    while True:  # after a year of down time not every minute of it is looked at
        start = max(after, until - timedelta(days=days))
        if found := slots(schedule, start, until):
            return found[-1]
        if start == after:
            return None
        days *= 8


def pending(schedule: Schedule, record: Record, now: datetime) -> datetime | None:
    """Return the slot that is to run now if nothing hinders it: the latest, or what waits."""
    since, recent = record.seen, now - GRACE
    # Neither a new schedule nor another cron line brings slots that nobody expected back then.
    changed = record.last is None or record.last.clock != schedule.clock
    if since is None or changed or schedule.catch_up == "none":
        since = max(since or recent, recent)
    if slot := latest(schedule, since, now) if since < now else None:
        return slot
    return record.queued if record.queued and record.queued <= now else None


def choose(schedule: Schedule, record: Record, job: str | None, now: datetime) -> Decision:
    """Decide what is to be done about a schedule.

    Args:
        schedule: The schedule.
        record: What became of its slots.
        job: What the cluster says of the last run's job: "running", "ended", or None, unknown.
        now: The time.
    """
    slot, last = pending(schedule, record, now), record.last
    busy = f"{last.name} is still running" if last and job == "running" else None
    if last and not last.submitted and job is None:
        if abs(now - last.at) < PATIENCE:  # also if the other machine's clock is ahead
            busy = f"{last.name} was claimed by {last.host} at {last.at:%H:%M} UTC, not submitted"
        elif slot is None and _is_wanted(schedule, last.slot, now):
            return Decision(action="again", slot=last.slot, why="claimed, but never submitted")
    if slot is None:
        return Decision(action="rest", why=busy or "nothing is due")
    if busy is None:
        late = "" if now - slot <= GRACE else f", {now - slot} late"
        return Decision(action="run", slot=slot, why=f"due at {slot:%Y-%m-%d %H:%M} UTC{late}")
    return Decision(action="skip" if schedule.overlap == "skip" else "wait", slot=slot, why=busy)


def coming(schedules: Sequence[Schedule], now: datetime, days: int = 7) -> list[Coming]:
    """Return the slots of the coming days, earliest first."""
    until = now + timedelta(days=days)
    found = [
        Coming(slot=slot, schedule=schedule)
        for schedule in schedules
        for slot in slots(schedule, now, until)
    ]
    return sorted(found, key=lambda row: (row.slot, row.schedule.name))


def load_schedules(path: Path) -> tuple[Schedule, ...]:
    """Read schedules; their sweeps' paths are then relative to the working directory.

    Raises:
        SweepError: For anything wrong, in one line.
    """
    if not path.is_file():
        raise SweepError(f"{path} does not exist; give a TOML file like cluster/schedules.toml")
    try:
        schedules = _File.model_validate(tomllib.loads(path.read_text())).schedules
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        # First the unknown keys: what is missing may only be misspelt.
        problems = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        part = Schedule if len(problems[0]["loc"]) > 1 else _File
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SweepError(
            f"{path}: {problem_line(problems[0], lambda: list(part.model_fields))}{more}"
        ) from error
    return tuple(
        schedule.model_copy(update={"sweep": Path(os.path.normpath(path.parent / schedule.sweep))})
        for schedule in schedules
    )


def _is_wanted(schedule: Schedule, slot: datetime, now: datetime) -> bool:
    """Whether a slot that was claimed and not submitted may still be."""
    return slot <= now and (schedule.catch_up == "last" or now - slot <= GRACE)
