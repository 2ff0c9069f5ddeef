"""The front of a sweep while it grows: a trial that ends is compared with its members alone."""

from __future__ import annotations

from collections.abc import Sequence

from search.records.front import Front, build_front
from search.records.trial_record import TrialRecord


class GrowingFront:
    """The front of the records so far, at a cost that does not depend on how many there are.

    What a member beats is beaten for good, so that it can be forgotten: the front of the members
    and what is new is the front of everything. Only plans that are trained again are kept whatever
    they came to, since their means decide.

    Attributes:
        classes: Names of the classes; empty if they have none.
        dense: The dense model's record; None until it is measured.
        front: As `build_front` returns it for all records; None until then too.
    """

    def __init__(self, cost: str) -> None:
        """Start without records.

        Args:
            cost: What accuracy is traded against.
        """
        self.cost = cost
        self.classes: tuple[str, ...] = ()
        self.front: Front | None = None
        self.dense: TrialRecord | None = None
        self._points: dict[str, TrialRecord] = {}

    def add(self, *records: TrialRecord) -> None:
        """Take records of trials that ended.

        With the record of a plan that was trained again must come that of its first training.
        """
        new = [record for record in records if record.status in ("finished", "dense")]
        if not new:
            return
        for record in new:
            if record.status == "dense":
                self.dense = record
            else:
                self._points[record.trial] = record
        if self.dense is None:
            return
        ordered = [self._points[trial] for trial in sorted(self._points)]  # for equal points
        self.front = build_front([self.dense, *ordered], self.cost, self.classes)
        kept = {member.trial for member in self.front.members}
        for record in ordered:
            if record.origin in ("confirm", "final"):
                kept |= {record.trial, record.of}
        self._points = {trial: r for trial, r in self._points.items() if trial in kept}


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
