"""The front of a sweep: the trials that no other one beats in cost and accuracy."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from search.records import pareto
from search.records.trial_record import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Front:
    """The trials worth having.

    Attributes:
        cost: "effective_gmacs", "gmacs" or "latency", what accuracy is traded against.
        hypervolume: Area dominated in (cost / dense cost, top-1 / 100), up to `REFERENCE`.
        dense: The dense model, as trained, without any fine-tuning.
        members: The members, cheapest first.
        classes: Names of the classes; empty if they have none.
    """

    cost: str
    hypervolume: float
    dense: TrialRecord
    members: tuple[TrialRecord, ...]
    classes: tuple[str, ...] = ()


REFERENCE = {"cost_ratio": 1.0, "top1": 0.0}
"""Reference point of the hypervolume: the dense model's cost, and no correct answer."""

COSTS = ("effective_gmacs", "gmacs", "latency")
"""What accuracy can be traded against."""


def build_front(records: Sequence[TrialRecord], cost: str, classes: tuple[str, ...] = ()) -> Front:
    """Return the non-dominated ones of the finished trials that violate no constraint.

    As soon as plans have been trained with further seeds, only these are compared, by their means:
    a single run that was best of many is best by luck too.

    Raises:
        ValueError: If the dense model is not among the records.
    """
    dense = next((r for r in records if r.status == "dense"), None)
    if dense is None:
        raise ValueError("no record has the status 'dense'; measure the dense model first")
    whole = [
        r for r in records if r.status == "finished" and not r.violates and _is_finite(r, cost)
    ]
    points = _confirmed(whole)
    costs = [cost_of_record(r, cost) / cost_of_record(dense, cost) for r in points]
    accuracies = [(r.val_top1 or 0.0) / 100.0 for r in points]
    members = [r for r, best in zip(points, pareto.front(costs, accuracies), strict=True) if best]
    volume = pareto.hypervolume(
        costs,
        accuracies,
        reference_cost=REFERENCE["cost_ratio"],
        reference_accuracy=REFERENCE["top1"],
    )
    members.sort(key=lambda r: cost_of_record(r, cost))
    return Front(
        cost=cost, hypervolume=volume, dense=dense, members=_marked(members), classes=classes
    )


def cost_of_record(record: TrialRecord, cost: str) -> float:
    """Return the cost of a trial: GMACs, or milliseconds per image."""
    return float(getattr(record, "latency_ms" if cost == "latency" else cost))


def _confirmed(whole: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Put a plan's runs of the same length together; leave out what others have more seeds of."""
    again: dict[tuple[str, int], list[TrialRecord]] = {}
    for record in whole:
        if record.origin == "confirm":
            again.setdefault((record.of, record.epochs), []).append(record)
    if not again:
        return list(whole)
    found = [record for record in whole if record.origin == "final"]
    for record in whole:
        runs = again.get((record.trial, record.epochs))
        if runs:
            tops = [run.val_top1 or 0.0 for run in runs]
            found.append(
                dataclasses.replace(
                    record,
                    val_top1=statistics.fmean(tops),
                    spread=statistics.stdev([record.val_top1 or 0.0, *tops]),
                    runs=1 + len(runs),
                )
            )
    return found


def _marked(members: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Mark members that the next cheaper one may equal."""
    marked = list(members[:1])
    for cheaper, member in itertools.pairwise(members):
        noise = math.hypot(cheaper.spread or 0.0, member.spread or 0.0)
        gain = (member.val_top1 or 0.0) - (cheaper.val_top1 or 0.0)
        marked.append(dataclasses.replace(member, within_spread=gain < noise))
    return tuple(marked)


def cost_ratio(front: Front, record: TrialRecord) -> float:
    """Cost of a trial as a share of the dense model's."""
    return cost_of_record(record, front.cost) / cost_of_record(front.dense, front.cost)


def _is_finite(record: TrialRecord, cost: str) -> bool:
    values = (record.val_top1, getattr(record, "latency_ms" if cost == "latency" else cost))
    return all(value is not None and math.isfinite(value) for value in values)
