"""Which plans are trained again: with other seeds (`confirm`), and for longer (`final_epochs`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from search.records import pareto
from search.strategy.proposer import Told


def to_confirm(told: Sequence[Told], margin: float) -> list[Told]:
    """Return the front's members and what nearly is one, cheapest first.

    The front of a search is what was best by merit and by luck together; what lies just below it
    may be as good. There are at most as many near misses as members, the nearest ones.

    Args:
        told: Plans that were tuned to their full length.
        margin: How far below the front, in points of top-1, a near miss may lie.
    """
    best = pareto.front([t.cost for t in told], [t.top1 for t in told])
    members = [t for t, keeps in zip(told, best, strict=True) if keeps]
    gaps = {
        t.name: max(m.top1 for m in members if m.cost <= t.cost) - t.top1
        for t, keeps in zip(told, best, strict=True)
        if not keeps
    }
    near = sorted((gap, name) for name, gap in gaps.items() if gap <= margin)[: len(members)]
    wanted = {member.name for member in members} | {name for _, name in near}
    return sorted((t for t in told if t.name in wanted), key=lambda t: t.cost)


def to_train_long(told: Sequence[Told], repeats: Mapping[str, Sequence[float]]) -> list[Told]:
    """Return the members of the front, cheapest first: of the confirmed means, if there are any.

    Args:
        told: Plans that were tuned to their full length.
        repeats: Name of a plan -> top-1 with further seeds.
    """
    candidates = [t for t in told if repeats.get(t.name)] or list(told)
    means = [statistics.fmean(repeats.get(t.name) or [t.top1]) for t in candidates]
    best = pareto.front([t.cost for t in candidates], means)
    members = [t for t, keeps in zip(candidates, best, strict=True) if keeps]
    return sorted(members, key=lambda t: t.cost)


def standard_error(top1: float, images: int) -> float:
    """Return the standard error of a top-1 (percent) that was measured on so many images."""
    share = top1 / 100.0
    return 100.0 * (share * (1.0 - share) / images) ** 0.5
