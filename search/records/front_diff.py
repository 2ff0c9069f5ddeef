"""Changes that a sweep made to the front that it started from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from search.records import pareto
from search.records.front import REFERENCE, Front, cost_ratio
from search.records.trial_record import TrialRecord

Point = tuple[float, float]
"""Cost as a share of the dense model's, and top-1 in percent."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Two fronts, compared on validation images.

    Attributes:
        before: Hypervolume of the earlier one.
        after: Of the later one, with the same reference point.
        gained: Members of the later front that the earlier one had nothing as good as.
        lost: Members of the earlier front that the later one has nothing as good as.
    """

    before: float
    after: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        """Whether the later front is the smaller one."""
        return self.after < self.before

    def describe(self) -> str:
        """Say it in one line."""
        share = f" ({100 * (self.after / self.before - 1):+.2g} %)" if self.before else ""
        return (
            f"hypervolume {self.before:.4f} before, {self.after:.4f} now{share}; points gained: "
            f"{', '.join(self.gained) or 'none'}; lost: {', '.join(self.lost) or 'none'}"
        )


def change(before: Front, after: Front) -> Change:
    """Compare two fronts by what the later one counts as cost."""
    before = dataclasses.replace(before, cost=after.cost)
    old, new = ([_point(front, member) for member in front.members] for front in (before, after))
    return Change(
        before=_hypervolume(old),
        after=_hypervolume(new),
        gained=_beyond(after.members, new, old),
        lost=_beyond(before.members, old, new),
    )


def _point(front: Front, member: TrialRecord) -> Point:
    if member.val_top1 is None:
        raise ValueError(f"trial {member.trial} of a front has no val_top1; give one that finished")
    return cost_ratio(front, member), member.val_top1


def _beyond(
    members: Sequence[TrialRecord], points: Sequence[Point], others: Sequence[Point]
) -> tuple[str, ...]:
    """Return the names of members that no other point is as good as in both."""
    return tuple(
        member.trial
        for member, (cost, top1) in zip(members, points, strict=True)
        if not any(c <= cost and t >= top1 for c, t in others)
    )


def _hypervolume(points: Sequence[Point]) -> float:
    return pareto.hypervolume(
        [cost for cost, _ in points],
        [top1 / 100.0 for _, top1 in points],
        reference_cost=REFERENCE["cost_ratio"],
        reference_accuracy=REFERENCE["top1"],
    )
