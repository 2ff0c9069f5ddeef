"""Meeting a budget: groups of sites are scaled by bisection until a plan's cost is close to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pruners import Plan

TOLERANCE = 0.01
"""Distance from the budget, as a share of it, within which sampled shares are not scaled."""

CLOSE = 0.001
"""Distance, as a share of it, at which the search for a plan that meets a budget ends."""

HALVINGS = 24
"""Most tries for a plan: finer than one unit of any site but the largest weight matrices."""

Group = tuple[str, str]
"""A step's label, and one of its groups of sites."""

Costed = tuple[Plan, float]
"""A plan, and its cost as a share of the dense model's."""

Planner = Callable[[Mapping[Group, float]], Costed]
"""Positions of all groups, in 0..1 -> the plan there. Costs fall as positions rise."""


def meet_budget(
    groups: Sequence[Group], plan_at: Planner, budget: float, low: float, high: float
) -> list[Costed]:
    """Return plans whose costs are close to a budget, on both sides of it.

    First all groups are scaled together. Where that jumps over the budget (units and tokens are
    whole), one group alone cuts the rest, the finest that comes close enough.

    Args:
        groups: Groups of sites that can be scaled, coarse ones first.
        plan_at: Makes the plans. At 1/2 a plan has the sampled shares, and keeps them if it is
            within `TOLERANCE` of the budget.
        budget: Cost to meet.
        low: Least cost that counts as met.
        high: Largest one.
    """
    target = _Target(plan_at=plan_at, budget=budget, low=low, high=high)
    whole = target.halve(dict.fromkeys(groups, 0.5), groups, 0.0)
    if whole.met or whole.above is None:
        return whole.plans
    found = list(whole.plans)
    for group in reversed(groups):
        alone = target.halve(whole.above, [group], whole.above[group])
        if alone.met:
            return alone.plans
        found += alone.plans
    return found


@dataclass(frozen=True, kw_only=True)
class _Halving:
    """Result of a bisection: one plan that meets the budget, or those around it."""

    plans: list[Costed]
    met: bool = False
    above: dict[Group, float] | None = None
    """Positions of the last plan that cost too much."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    plan_at: Planner
    budget: float
    low: float
    high: float

    def halve(
        self, positions: Mapping[Group, float], moved: Sequence[Group], start: float
    ) -> _Halving:
        """Bisect the position of some groups, from a start to 1, until the budget is met."""
        left, right = start, 1.0
        ends: dict[str, Costed] = {}
        above = None
        for _ in range(HALVINGS):
            middle = (left + right) / 2
            tried = {**positions, **dict.fromkeys(moved, middle)}
            plan, ratio = self.plan_at(tried)
            near = CLOSE if ends else TOLERANCE
            if abs(ratio - self.budget) <= near * self.budget and self.low <= ratio <= self.high:
                return _Halving(plans=[(plan, ratio)], met=True)
            if ratio <= self.budget:
                ends["below"], right = (plan, ratio), middle
            else:
                ends["above"], left, above = (plan, ratio), middle, tried
        return _Halving(plans=list(ends.values()), above=above)
