"""The search space: Optuna parameters, and their plans, each within the MACs budget.

A trial samples a budget, how it is split between the steps, and how each step deviates from its
method's own layer-wise allocation; then one scale is turned until the plan's cost meets the
budget: the parameters say *how* the network shrinks, the budget says *how much*. The space is
static (every parameter exists in every trial), as Gaussian-process samplers need.

Steps that learn are alternatives, since each has learned of the dense model: a trial takes one of
them or none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import optuna

from pruners import Plan, ViTShape, cost_of
from search.space.budget import meet_budget
from search.space.farthest import farthest_first
from search.space.scaled_plans import ScaledPlans
from search.space.step import Parameters, Rung, SpaceStep

NO_LEARNER = "none"
"""Value of the parameter `learner` in a trial without a step that learns."""


class OutOfReachError(ValueError):
    """No scale of the sampled shares brings the cost into the sweep's budget range."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan to try and its cost, known before training."""

    parameters: Parameters
    plan: Plan
    cost_ratio: float
    """Cost after the plan as a share of the dense model's, in the sweep's chosen cost."""
    scores: str = ""
    """File of the scores (and learned weights) that the plan's first step cuts by, if there is."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Proposes parameters and turns them into plans. `search.space.build` builds and checks one.

    Attributes:
        dense: Shape of the dense model.
        cost: Field of a cost that the budget is one of: "effective_macs" or "macs".
        low: Lower end of the budget range, as a share of the dense cost.
        high: Its upper end.
        ladder_budgets: Number of budgets at which all steps are tried together first.
        alone_budgets: Number of budgets at which each step is then tried alone.
        steps: The steps, those that learn first.
    """

    dense: ViTShape
    cost: str
    low: float
    high: float
    ladder_budgets: int
    alone_budgets: int
    steps: tuple[SpaceStep, ...]

    @cached_property
    def learners(self) -> list[str]:
        """Labels of the steps that learn."""
        return [step.label for step in self.steps if step.learners()]

    @cached_property
    def dense_cost(self) -> int:
        """Cost of the dense model, in multiply-adds."""
        return getattr(cost_of(self.dense), self.cost)

    def measured(self, rungs: Mapping[str, Sequence[Rung]]) -> Space:
        """Return the space of methods that were measured on the dense model.

        Args:
            rungs: Label -> measurements of the step's method.
        """
        steps = (
            dataclasses.replace(step, rungs=tuple(rungs.get(step.label, ()))) for step in self.steps
        )
        return dataclasses.replace(self, steps=tuple(steps))

    def refined(self) -> Space:
        """Return the space in which every step that deviates has a parameter per site."""
        return dataclasses.replace(self, steps=tuple(step.refined() for step in self.steps))

    def by_site(self, parameters: Parameters) -> Parameters:
        """Return this space's parameters as those of the refined space; the plan stays the same."""
        found = dict(parameters)
        for step in self.steps:
            found = step.by_site(self.dense, found)
        return found

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the bounds of every parameter that is a number."""
        found = {"budget": (self.low, self.high)}
        for step in self.steps:
            found |= step.ranges(self.dense)
        return found

    def choices(self) -> dict[str, list[str] | list[bool]]:
        """Return the values of every parameter that is a choice."""
        found: dict[str, list[str] | list[bool]] = {}
        if self.learners:
            found["learner"] = [*self.learners, NO_LEARNER]
        for step in self.steps:
            if step.label not in self.learners:
                found |= step.choices()
        return found

    def sample(self, trial: optuna.Trial) -> Parameters:
        """Sample all parameters of the space from an Optuna trial."""
        parameters: Parameters = {}
        for name, choices in self.choices().items():
            parameters[name] = trial.suggest_categorical(name, choices)
        for name, (low, high) in self.ranges().items():
            parameters[name] = trial.suggest_float(name, low, high)
        return parameters

    def ladder(self) -> list[Parameters]:
        """Return parameters of all steps together, each as its method allocates itself.

        Of the methods that learn one takes part, in turn. Budgets go from coarse to fine, so that
        the first of them span the range already.
        """
        budgets = _from_coarse_to_fine(self.low, self.high, self.ladder_budgets)
        return [self.neutral(budget, place) for place, budget in enumerate(budgets)]

    def alone(self) -> list[Parameters]:
        """Return parameters of each step alone, as its method allocates itself."""
        if len(self.steps) == 1:
            return []
        budgets = _from_coarse_to_fine(self.low, self.high, self.alone_budgets)
        plans = [
            self._alone(self.neutral(budget, place), step)
            for place, budget in enumerate(budgets)
            for step in self.steps
        ]
        return [plan for i, plan in enumerate(plans) if plan not in plans[:i]]

    def neutral(self, budget: float, place: int) -> Parameters:
        """Return the parameters of all steps together, as the methods allocate themselves.

        Args:
            budget: Cost ratio to meet.
            place: Place in a row of such parameters; the methods that learn take turns along it.
        """
        parameters: Parameters = dict.fromkeys(self.choices(), True)
        if self.learners:
            parameters["learner"] = self.learners[place % len(self.learners)]
        parameters["budget"] = budget
        for step in self.steps:
            parameters |= step.neutral(self.dense)
        return parameters

    def propose(self, parameters: Parameters) -> Proposal:
        """Return the plan of some parameters, whose cost meets the sampled budget.

        Steps that are absent join if the others alone cannot reach the budget: refusing such
        parameters would teach a sampler nothing, and it would propose them again. Of the two plans
        around the budget (units are whole) the nearer one within the sweep's range is taken.

        Raises:
            OutOfReachError: If neither lies within the range.
        """
        budget, plans = float(parameters["budget"]), self.plans(parameters)
        if plans.least_cost() > budget:
            plans = dataclasses.replace(plans, weights=self._joint_weights(parameters))
        found = meet_budget(plans.groups(), plans.at, budget, self.low, self.high)
        inside = [(plan, ratio) for plan, ratio in found if self.low <= ratio <= self.high]
        if not inside:
            raise OutOfReachError(
                f"no scale of these shares costs between {self.low} and {self.high} of dense"
            )
        plan, ratio = min(inside, key=lambda found: abs(found[1] - budget))
        scores = self._scores(plan, budget)
        return Proposal(parameters=parameters, plan=plan, cost_ratio=ratio, scores=scores)

    def plans(self, parameters: Parameters) -> ScaledPlans:
        """Return all plans of some parameters, uncut to cut as far as may be."""
        learner = parameters.get("learner")
        return ScaledPlans(
            dense=self.dense,
            steps=self.steps,
            weights={
                step.label: step.weight(parameters) if self._plays(step, learner) else 0.0
                for step in self.steps
            },
            parameters=parameters,
            cost_ratio=self.cost_ratio,
        )

    def cost_ratio(self, plan: Plan) -> float:
        """Return the cost after a plan, as a share of the dense model's."""
        return getattr(cost_of(plan.shape(self.dense)), self.cost) / self.dense_cost

    def _plays(self, step: SpaceStep, learner: float | bool | str | None) -> bool:
        """Whether a step can take part beside the learner of a trial."""
        return step.label not in self.learners or step.label == learner

    def _joint_weights(self, parameters: Parameters) -> dict[str, float]:
        """Return each step's part in how the budget is split, where those that are absent join."""
        learner = parameters.get("learner")
        if learner == NO_LEARNER:
            learner = self.learners[0]
        return {
            step.label: (step.weight(parameters) or 1.0) if self._plays(step, learner) else 0.0
            for step in self.steps
        }

    def _scores(self, plan: Plan, budget: float) -> str:
        """Return the file of scores that a plan's first step can be cut by: others see less."""
        for step, planned in zip(self.steps, plan.steps, strict=True):
            if planned.active:
                rung = step.rung(budget)
                return rung.path if rung is not None and step.pruner.family == "unit" else ""
        return ""

    def _alone(self, parameters: Parameters, step: SpaceStep) -> Parameters:
        """Return parameters in which the other steps are absent."""
        alone = dict(parameters)
        if self.learners:
            alone["learner"] = step.label if step.label in self.learners else NO_LEARNER
        for other in self.steps:
            if other.label != step.label and other.label not in self.learners:
                alone |= other.absent()
        return alone


def _from_coarse_to_fine(low: float, high: float, count: int) -> list[float]:
    """Return so many numbers of a range, evenly spaced, the ends first; of one, the middle."""
    if count == 1:
        return [(low + high) / 2]
    numbers = np.linspace(low, high, count)
    return numbers[farthest_first(numbers[:, None])].tolist()
