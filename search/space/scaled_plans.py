"""All plans of one set of parameters, from uncut to cut as far as may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pruners import Plan, Step, ViTShape
from search.space.budget import Costed, Group
from search.space.step import Parameters, SpaceStep


@dataclass(frozen=True, kw_only=True)
class ScaledPlans:
    """Plans that differ in how far each group of sites is scaled.

    Attributes:
        dense: The dense model's shape.
        steps: The steps of the space.
        weights: Label -> the step's part in how the budget is split; 0 leaves it out.
        parameters: Values of the space's parameters.
        cost_ratio: Cost of a plan, as a share of the dense model's.
    """

    dense: ViTShape
    steps: tuple[SpaceStep, ...]
    weights: Mapping[str, float]
    parameters: Parameters
    cost_ratio: Callable[[Plan], float]

    def groups(self) -> list[Group]:
        """Return the groups of sites of the steps that take part, coarse ones of a step first."""
        present = [step for step in self.steps if self.weights[step.label]]
        return [(step.label, group) for step in present for group in step.groups(self.dense)]

    def at(self, positions: Mapping[Group, float]) -> Costed:
        """Return the plan at positions 0 (uncut) to 1 (cut as far as may be) of the groups."""
        plan = self._plan(positions)
        return plan, self.cost_ratio(plan)

    def least_cost(self) -> float:
        """Return the cost ratio of the plan that is cut as far as may be."""
        return self.at(dict.fromkeys(self.groups(), 1.0))[1]

    def _plan(self, positions: Mapping[Group, float]) -> Plan:
        shape, steps = self.dense, []
        budget, total = float(self.parameters["budget"]), sum(self.weights.values())
        for step in self.steps:
            pruner = step.pruner_for(budget)
            thresholds = dict.fromkeys(pruner.sites(self.dense), 0.0)
            if weight := self.weights[step.label]:
                part = budget ** (weight / total)  # costs of steps multiply
                scales = {
                    group: place / (1.0 - place) if place < 1.0 else math.inf
                    for (label, group), place in positions.items()
                    if label == step.label
                }
                thresholds = step.shares(shape, self.dense, self.parameters, part, scales)
                shape = pruner.shrink(shape, thresholds)
            steps.append(Step(pruner=pruner, thresholds=thresholds))
        return Plan(steps=tuple(steps))
