"""Plans drawn at random from a search space."""

from __future__ import annotations

import optuna
from optuna.samplers import RandomSampler

from pruners import Plan
from search.space.space import OutOfReachError, Space


def draw_plans(space: Space, count: int, seed: int) -> tuple[Plan, list[Plan]]:
    """Return the first plan of the smallest budget, and so many plans drawn at random.

    Raises:
        OutOfReachError: If no plan meets the smallest budget.
    """
    study = optuna.create_study(sampler=RandomSampler(seed=seed))
    plans: list[Plan] = []
    for _ in range(10 * count):
        if len(plans) == count:
            break
        try:
            plans.append(space.propose(space.sample(study.ask())).plan)
        except OutOfReachError:
            continue
    return space.propose(space.neutral(space.low, 0)).plan, plans
