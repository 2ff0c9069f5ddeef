"""The write-ahead log of a sweep, and the records that its events add up to.

The ledger is the sweep's only state: an event is in a file before anything builds on it, and a
driver that starts again replays the events to the searcher, the scheduler and the records. Ray's
own snapshots are not used: they are pickled, come every ten seconds at most, and when one cannot be
read, Ray starts anew.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from pruners import Plan
from search.records.atomic import writing_to
from search.records.constraints import violated
from search.records.events import EpochResult, Event, TrialConfig, TrialEnd, of_trial
from search.records.growing_front import GrowingFront
from search.records.journal import Journal
from search.records.trial_record import TrialRecord, model_path
from search.sweep.spec import Sweep, SweepError

LEDGER = "ledger.jsonl"
"""File of a sweep's directory that holds its events.

Each has its kind as `event` and milliseconds since 1970 as `time`. `began`: a driver starts or
resumes the sweep. `identity`: digests of its model and images. `classes`: their names. `learned`,
`elastic`: what came before the trials. `asked`: a trial's configuration. `epoch`: its result after
one. `ended`: its last status, and the front's hypervolume. `stopped`: why no more plans are asked
for.
"""

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading a line raises that is not what was written."""


class Ledger:
    """The events of a sweep, and the state that they add up to.

    Attributes:
        past: Events of earlier drivers.
        seconds: What these have run, together.
        records: Trial -> record.
        growing: The front.
        ended: Trials that have ended.
        spent: Epochs of fine-tuning, of all trials.
    """

    def __init__(
        self,
        sweep: Sweep,
        clock: Callable[[], float] = time.time,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the ledger in the sweep's directory; none need be there.

        Args:
            sweep: The sweep.
            clock: Seconds since 1970.
            may_write: As of `Journal`.

        Raises:
            ValueError: If it is damaged.
        """
        self.sweep, self.clock = sweep, clock
        self.journal = Journal(sweep.directory / LEDGER, may_write)
        self.records: dict[str, TrialRecord] = {}
        self.growing = GrowingFront(sweep.cost)
        self.ended = self.spent = 0
        self.past = self.journal.read()
        try:
            self.seconds = _active_ms(self.past) / 1000.0
            for event in self.past:
                self._take(event)
        except _DAMAGE as error:
            raise ValueError(
                f"{self.journal.path} lacks what came before one of its lines ({error}); put back "
                "a copy of it, or move its directory away to start anew"
            ) from error

    def begin(self) -> None:
        """Note that a driver starts."""
        self._add("began")

    def add_once(self, kind: str, **values: Any) -> None:
        """Add an event of which a sweep has one."""
        if not any(event["event"] == kind for event in self.past):
            self._add(kind, **values)

    def identify(self, fingerprint: Mapping[str, str]) -> None:
        """Note which model and images the sweep is about, or see that they are still the same.

        Raises:
            SweepError: If they are not.
        """
        for event in self.past:
            if event["event"] == "identity":
                refuse_another(event["digests"], fingerprint, self.sweep.name)
        self.add_once("identity", digests=dict(fingerprint))

    def ask(self, config: TrialConfig) -> None:
        """Note that a trial begins, with this configuration."""
        self._add("asked", config=config.to_json())

    def stop(self, why: str) -> None:
        """Note why no more plans are asked for."""
        self._add("stopped", why=why)

    def report(self, result: EpochResult) -> bool:
        """Note a trial's result after an epoch; False if it is known: it may be repeated."""
        known = self.records[result.trial].history
        if any(epoch["epoch"] == result.epoch for epoch in known):
            return False
        self._add("epoch", result=result.to_json())
        return True

    def end(self, trial: str, status: str, reason: str) -> TrialRecord:
        """Note that a trial has ended."""
        now = self._now()  # a front takes a while
        self._end(self.records[trial], status, reason)
        front = self.growing.front
        end = TrialEnd(
            trial=trial,
            status=status,
            reason=reason,
            count=self.ended,
            hypervolume=front.hypervolume if front else None,
            front_size=len(front.members) if front else 0,
        )
        self._append({"event": "ended", "time": now, **end.to_json()})
        return self.records[trial]

    def _add(self, kind: str, **values: Any) -> None:
        event = {"event": kind, "time": self._now(), **values}
        self._append(event)
        self._take(event)

    def _append(self, event: Event) -> None:
        with writing_to(self.sweep.directory):
            self.journal.append(event)

    def _now(self) -> int:
        return int(1000 * self.clock())

    def _take(self, event: Event) -> None:
        """Let the records follow an event."""
        match of_trial(event):
            case TrialConfig() as config:
                self.records[config.trial] = new_record(config)
            case EpochResult() as result:
                self.records[result.trial] = with_result(self.records[result.trial], result)
                self.spent += result.epoch > 0  # 0 comes before any fine-tuning
            case TrialEnd() as end:
                self._end(self.records[end.trial], end.status, end.reason)
        if event["event"] == "classes":
            self.growing.classes = tuple(event["names"])

    def _end(self, record: TrialRecord, status: str, reason: str) -> None:
        model = "" if status == "failed" else model_path(record.trial, record.epochs)
        record = dataclasses.replace(
            record, status=status, reason=reason, checkpoint=model, spent=self.spent
        )
        new = [self._judged(record, self.growing.dense)]
        if status == "dense":  # what ended before it could not be compared with it
            early = [r for r in self.records.values() if r.trial != record.trial]
            new += [self._judged(r, record) for r in early if r.status == "finished"]
        for changed in new:
            self.records[changed.trial] = changed
        self.ended += 1
        first = [self.records[record.of]] if record.of in self.records else []
        self.growing.add(*new, *first)

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


def new_record(config: TrialConfig) -> TrialRecord:
    """Return the record of a trial that has just got its configuration."""
    values = json.loads(config.plan)
    plan = Plan.from_json(values)
    methods = "+".join(step.pruner.name for step in plan.steps if step.active) or "dense"
    return TrialRecord(
        trial=config.trial,
        name=f"{config.trial} {methods}"
        + (f" {config.cost_ratio:.2f}x" if methods != "dense" else "")
        + (f" ({config.origin} {config.of})" if config.of else ""),
        status="running",
        origin=config.origin,
        of=config.of,
        seed=config.seed,
        parameters=config.parameters,
        methods=methods,
        cost_ratio=config.cost_ratio,
        plan=values,
        plan_line=plan.describe(),
    )


def with_result(record: TrialRecord, result: EpochResult) -> TrialRecord:
    """Return a record with one more epoch."""
    return dataclasses.replace(
        record,
        status=result.status,
        reason=result.reason,
        epochs=result.epoch,
        val_top1=result.val_top1,
        by_class=result.by_class,
        gmacs=result.gmacs,
        effective_gmacs=result.effective_gmacs,
        params=result.params,
        density=result.density,
        images_per_s=result.images_per_s,
        latency_ms=result.latency_ms,
        shape=json.loads(result.shape),
        seconds=result.seconds,
        history=[*record.history, {"epoch": result.epoch, **result.finite()}],
    )


def _drop(record: TrialRecord, dense: TrialRecord | None) -> float | None:
    if dense is None or dense.val_top1 is None or record.val_top1 is None:
        return None
    return dense.val_top1 - record.val_top1


def _active_ms(events: list[Event]) -> int:
    """Milliseconds from each driver's start to its last event."""
    total = start = last = 0
    for event in events:
        if event["event"] == "began":
            total, start = total + last - start, event["time"]
        last = event["time"]
    return total + last - start


def refuse_another(began: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Refuse to resume a sweep with another model or other images than it began with.

    Raises:
        SweepError: For the first that has changed.
    """
    for key, digest in began.items():
        if now.get(key) != digest:
            raise SweepError(
                f"{key} has changed since sweep {name} began (SHA-256 {digest[:12]} then, "
                f"{str(now.get(key))[:12]} now); put it back, or give the sweep another name"
            )
