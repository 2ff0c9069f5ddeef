"""Hypervolume against the epochs of fine-tuning that a sweep spent."""

from __future__ import annotations

from collections.abc import Sequence

from search.growing_front import GrowingFront
from search.results import TrialRecord


def growth(records: Sequence[TrialRecord], cost: str) -> list[tuple[int, float]]:
    """Return (epochs spent, hypervolume) wherever a trial ended, epochs ascending.

    The first is where the dense model was measured. Of trials that ended at the same epoch the last
    one counts.

    Args:
        records: All trials of a sweep, in any order.
        cost: What accuracy is traded against.
    """
    growing, by_name = GrowingFront(cost), {record.trial: record for record in records}
    ended = [record for record in records if record.status != "running"]
    volumes: dict[int, float] = {}
    for record in sorted(ended, key=lambda r: (r.spent, r.trial)):
        growing.add(record, *([by_name[record.of]] if record.of in by_name else []))
        if growing.front is not None:
            volumes[record.spent] = growing.front.hypervolume
    return list(volumes.items())
