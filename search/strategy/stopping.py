"""When a sweep asks for no further plans: trials, hours, or a front that no longer grows."""

from __future__ import annotations

from collections.abc import Sequence

from search.records import pareto
from search.strategy.proposer import Told
from search.sweep.spec import Sweep

REFERENCE_COST = 1.0
REFERENCE_TOP1 = 0.0


def why_stop(sweep: Sweep, asked: int, seconds: float, told: Sequence[Told]) -> str:
    """Say in a few words why a sweep asks for no more plans; nothing if it goes on.

    Args:
        sweep: The sweep.
        asked: Trials so far, running ones included.
        seconds: What the sweep has run, earlier runs of it included.
        told: Results of the plans, in the order in which they ended.
    """
    if asked >= sweep.trials:
        return f"{sweep.trials} trials"
    if sweep.max_hours is not None and seconds >= sweep.max_hours * 3600.0:
        return f"max_hours = {sweep.max_hours:g} have passed"
    if sweep.patience and len(told) > sweep.patience:
        before, now = (_hypervolume(part) for part in (told[: -sweep.patience], told))
        if now <= before * (1.0 + sweep.min_growth):
            growth = now / before - 1.0 if before else 0.0
            return (
                f"the hypervolume grew by {100 * growth:.2g} % in the last {sweep.patience} "
                f"trials, no more than min_growth = {100 * sweep.min_growth:g} %"
            )
    return ""


def _hypervolume(told: Sequence[Told]) -> float:
    return pareto.hypervolume(
        [t.cost for t in told],
        [t.top1 / 100.0 for t in told],
        reference_cost=REFERENCE_COST,
        reference_accuracy=REFERENCE_TOP1,
    )
