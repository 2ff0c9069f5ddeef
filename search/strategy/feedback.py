"""Results as the proposer is told them: their costs and drops are against the dense model's.

A trial may end before the dense model has been measured; its result waits until then.
"""

from __future__ import annotations

from search.records.constraints import violations
from search.records.events import EpochResult
from search.strategy.proposer import Proposer
from search.sweep.spec import Sweep


class Feedback:
    """Tells a proposer how the plans that it proposed did."""

    def __init__(self, sweep: Sweep, proposer: Proposer) -> None:
        """Wait for the dense model."""
        self.sweep, self.proposer = sweep, proposer
        self._dense: EpochResult | None = None
        self._dense_comes = True
        self._early: list[tuple[str, EpochResult]] = []

    def dense(self, result: EpochResult | None) -> None:
        """Take the dense model's result, None if there is none, and tell what waited for it."""
        self._dense, early, self._early = result, self._early, []
        self._dense_comes = False
        for name, ended in early:
            self.plan(name, ended)

    def plan(self, name: str, result: EpochResult | None) -> None:
        """Take the last result of a trial of a proposed plan, None if it failed."""
        if result is None or (self._dense is None and not self._dense_comes):
            self.proposer.fail(name)
        elif self._dense is None:
            self._early.append((name, result))
        else:
            self._tell(name, result, self._dense)

    def _tell(self, name: str, result: EpochResult, dense: EpochResult) -> None:
        cost = result.cost_ratio
        if self.sweep.cost == "latency":
            cost = result.latency_ms / dense.latency_ms
        constraints = violations(
            self.sweep.constraints,
            params=result.params,
            images_per_s=result.images_per_s,
            drop=dense.val_top1 - result.val_top1,
        )
        stopped = result.status != "finished"
        if stopped and "max_drop" in constraints:  # what it had lost, it might have won back
            constraints["max_drop"] = min(0.0, constraints["max_drop"])
        self.proposer.tell(name, float(result.val_top1), float(cost), constraints, stopped=stopped)
