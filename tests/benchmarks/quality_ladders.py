"""Arms without a search: plans at budgets that are spread evenly, the coarse ones first.

`uniform` cuts the same share everywhere. `own` takes each method's own allocation, all steps
together. `curvature` ranks units once, over all layers, by the diagonal of the empirical Fisher
matrix per MAC, as single-shot curvature methods do (SnapViT, NeurIPS 2025, is the manner; the score
is `pruners.methods.fisher` summed over units); `curvature_tome` leaves half of it (the root of the
budget) to ToMe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from anytime import coarse_to_fine
from journal import Journal
from quality_problem import HIGH, LOW, Bench, tokens, units

from pruners import Plan, PrunableViT, Step, load_method
from search.space.allocation import own_allocation
from search.space.build import build_space
from search.space.space import OutOfReachError
from search.space.step import Rung

Cut = tuple[str, float, Callable[[], PrunableViT]]
"""What it is, its cost as a share of the dense model's, and what makes the model."""

OVERSHOOTS = 100
"""Budgets, each a little larger, that are tried until a plan costs no less than `LOW`."""


def run_ladder(bench: Bench, journal: Journal, cuts: Iterable[Cut]) -> None:
    """Tune one cut after another, but for those that are in the journal."""
    start = time.perf_counter()
    for number, (what, cost, make) in enumerate(cuts):
        planned_s = time.perf_counter() - start  # scoring and looking for budgets, mostly the first
        if journal.find(number, what) is None:
            ended = bench.tried(number, what, cost, make)
            journal.add(replace(ended, before_s=planned_s + ended.before_s))
        start = time.perf_counter()


def budgets(count: int) -> list[float]:
    """Return budgets over the whole range, in the order in which they are tried."""
    return [float(np.linspace(LOW, HIGH, count)[i]) for i in coarse_to_fine(count)]


def uniform(bench: Bench, count: int) -> Iterator[Cut]:
    """Cut the same share at all sites of all steps."""

    def plan_of(share: float) -> Plan:
        steps: tuple[Step, ...] = ()
        for pruner in (units(), tokens()):
            sites = pruner.sites(Plan(steps=steps).shape(bench.shape))
            steps += (Step(pruner=pruner, thresholds=dict.fromkeys(sites, share)),)
        return Plan(steps=steps)

    plans = [plan_of(share) for share in np.linspace(0.0, 0.99, 1_000)]
    costs = [bench.ratio(plan) for plan in plans]
    inside = [(plan, cost) for plan, cost in zip(plans, costs, strict=True) if LOW <= cost <= HIGH]
    for budget in budgets(count):
        plan, cost = min(inside, key=lambda found: abs(found[1] - budget))
        yield _cut(bench, plan, cost)


def curvature(bench: Bench, count: int, *, tome: bool) -> Iterator[Cut]:
    """Cut units by a global ranking, with merged patches beside it or without."""
    ranking = load_method("grouped", criterion="fisher")
    scores = bench.scored(ranking).scores

    def plan_of(budget: float) -> Plan:
        part = math.sqrt(budget) if tome else budget  # costs of steps multiply
        own = ranking.allocate(bench.shape, scores, part * bench.dense_macs)
        steps: tuple[Step, ...] = (Step(pruner=ranking, thresholds=own),)
        if tome:
            left = ranking.shrink(bench.shape, own)
            merged = tokens().allocate(left, {}, budget * bench.dense_macs)
            steps += (Step(pruner=tokens(), thresholds=merged),)
        return Plan(steps=steps)

    for budget in budgets(count):
        yield _cut(bench, *_in_range(bench, budget, plan_of))


def own(bench: Bench, count: int) -> Iterator[Cut]:
    """Cut as the methods themselves would: what a sweep tries first, at more budgets."""
    sweep = bench.sweep.model_copy(update={"ladder": count})
    known = {}
    unmeasured = build_space(sweep, bench.shape)
    for step in unmeasured.steps:
        scores = bench.scored(step.pruner).scores
        shares = own_allocation(step.pruner, bench.shape, scores, step.max_share)
        known[step.label] = [Rung(pruner=step.pruner, own=shares)]
    space = unmeasured.measured(known)
    ladder = sorted(space.ladder(), key=lambda parameters: float(parameters["budget"]))
    for place in coarse_to_fine(count):  # in the order of the other ladders
        proposal = space.propose(ladder[place])
        yield _cut(bench, proposal.plan, proposal.cost_ratio)


def _in_range(bench: Bench, budget: float, plan_of: Callable[[float], Plan]) -> tuple[Plan, float]:
    """Return the plan of a budget; of a slightly larger one if it costs less than is allowed."""
    for overshoot in range(OVERSHOOTS):
        plan = plan_of(budget * (1.0 + overshoot / 1_000))
        if (cost := bench.ratio(plan)) >= LOW:
            return plan, cost
    raise OutOfReachError(f"no plan near {budget:.3f} costs {LOW} or more")


def _cut(bench: Bench, plan: Plan, cost: float) -> Cut:
    return f"{cost:.4f}x {plan.describe()}", cost, lambda: bench.cut(plan)
