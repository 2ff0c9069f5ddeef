"""How the trials of a sweep ended, and why those that did not finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.records.trial_record import TrialRecord

ENDS = {"stopped": "stopped early", "failed": "failed"}
"""Statuses of trials that did not finish, in words."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why some trials did not finish.

    Attributes:
        end: Which end that was.
        why: In a line.
        trials: The trials.
    """

    end: str
    why: str
    trials: tuple[str, ...]


def counts(records: Sequence[TrialRecord]) -> str:
    """Say how many trials have which status."""
    statuses = ("finished", "stopped", "failed", "running")
    found = [(sum(r.status == status for r in records), status) for status in statuses]
    return ", ".join(f"{count} {status}" for count, status in found if count)


def reasons(records: Sequence[TrialRecord]) -> list[Reason]:
    """Return why trials did not finish: failures first, then the commonest first."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.status in ENDS:
            why = record.reason or "others of similar cost were better"
            found.setdefault((ENDS[record.status], why), []).append(record.trial)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    return [Reason(end=end, why=why, trials=tuple(t)) for (end, why), t in ordered]
