"""The search space: Optuna parameters, and the plans they mean, each within the MACs budget.

A trial samples a budget, how it is split between the steps, and how each step deviates from its
method's own layer-wise allocation; then one number is turned until the plan's cost meets the
budget: what is sampled says *how* the network shrinks, the budget says *how much*. The space is
static (every parameter exists in every trial), as Gaussian-process samplers need.

Steps that learn are alternatives, since each has learned of the dense model: a trial takes one of
them or none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.samplers import RandomSampler

from pruners import Plan, Step, ViTShape, cost_of
from pruners.families.learned import LearnedPruner
from pruners.model.sites import RAGGED
from search.space.budget import Group, meet
from search.space.farthest import farthest_first
from search.space.step import Parameters, Rung, SpaceStep, refined, space_step
from search.sweep.spec import Sweep, SweepError

NO_LEARNER = "none"
"""Value of the parameter `learner` in a trial without a step that learns."""


class OutOfReachError(ValueError):
    """No scale of the sampled shares brings the cost into the sweep's budget range."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan to try and what it will cost, known before training."""

    parameters: Parameters
    plan: Plan
    cost_ratio: float
    """Cost after the plan as a share of the dense model's, in the sweep's chosen cost."""
    scores: str = ""
    """File of the scores (and learned weights) that the plan's first step cuts by, if there is."""


class Space:
    """Proposes parameters and turns them into plans."""

    def __init__(
        self,
        sweep: Sweep,
        dense: ViTShape,
        rungs: Mapping[str, Sequence[Rung]] | None = None,
    ) -> None:
        """Prepare the space of a sweep over a model of the given shape.

        Args:
            sweep: The sweep.
            dense: Shape of the dense model.
            rungs: Label -> what is known of the step's method on the dense model. Without it only
                what can be reached is right, not how the shares run.

        Raises:
            SweepError: If a method or an option is unknown, the order of the steps is wrong, or the
                budget is out of reach.
        """
        self.dense = dense
        self.cost_name = "effective_macs" if sweep.cost == "effective_gmacs" else "macs"
        self.dense_cost = getattr(cost_of(dense), self.cost_name)
        self.low, self.high = sweep.budget.low, sweep.budget.high
        self.ladder_rungs, self.alone_rungs = sweep.ladder, sweep.alone
        self.steps = tuple(
            dataclasses.replace(
                space_step(label, spec, sweep.epochs), rungs=tuple((rungs or {}).get(label, ()))
            )
            for label, spec in zip(sweep.labels, sweep.steps, strict=True)
        )
        try:
            Plan(steps=tuple(Step(pruner=step.pruner) for step in self.steps))
            self.learners = [step.label for step in self.steps if step.learners()]
        except ValueError as error:
            raise SweepError(str(error)) from error
        if [step.label for step in self.steps][: len(self.learners)] != self.learners:
            raise SweepError(
                f"steps are {', '.join(sweep.labels)}; give those that learn first: "
                f"{', '.join(self.learners)}"
            )
        self._check_padding()
        least = min(self._least(rung) for rung in range(max(1, len(self.learners))))
        if least > self.low:
            raise SweepError(
                f"budget is [{self.low}, {self.high}] of the dense {sweep.cost}; these steps "
                f"reach {least:.3f} at their max_share, so give a larger lower end or more steps"
            )

    def refined(self) -> Space:
        """Return the space in which every step that deviates has a number for each site."""
        space = object.__new__(Space)
        space.__dict__ |= {**self.__dict__, "steps": tuple(refined(step) for step in self.steps)}
        return space

    def by_site(self, parameters: Parameters) -> Parameters:
        """Return this space's parameters as those of the refined space; the plan stays the same."""
        found = dict(parameters)
        for step in self.steps:
            if step.kind == "residual":
                for name in step.ranges(self.dense):
                    found.pop(name)
                found |= step.by_site(self.dense, parameters)
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
            if not step.deviates and step.label not in self.learners:
                found[f"{step.label}.present"] = [True, False]
        return found

    def sample(self, trial: optuna.Trial) -> Parameters:
        """Ask an Optuna trial for all parameters of the space."""
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
        budgets = self._budgets(self.ladder_rungs)
        return [self._neutral(budget, rung) for rung, budget in enumerate(budgets)]

    def alone(self) -> list[Parameters]:
        """Return parameters of each step alone, as its method allocates itself."""
        if len(self.steps) == 1:
            return []
        plans = [
            self._alone(self._neutral(budget, rung), step)
            for rung, budget in enumerate(self._budgets(self.alone_rungs))
            for step in self.steps
        ]
        return [plan for i, plan in enumerate(plans) if plan not in plans[:i]]

    def draw(self, count: int, seed: int) -> tuple[Plan, list[Plan]]:
        """Return the first plan of the smallest budget, and so many plans drawn at random."""
        study = optuna.create_study(sampler=RandomSampler(seed=seed))
        plans: list[Plan] = []
        for _ in range(10 * count):
            if len(plans) == count:
                break
            try:
                plans.append(self.propose(self.sample(study.ask())).plan)
            except OutOfReachError:
                continue
        return self.propose(self._neutral(self.low, 0)).plan, plans

    def propose(self, parameters: Parameters) -> Proposal:
        """Return the plan of some parameters, whose cost meets the sampled budget.

        Steps that are absent join if the others alone cannot reach the budget: refusing such
        parameters would teach a sampler nothing, and it would propose them again. Of the two plans
        around the budget (units are whole) the nearer one within the sweep's range is taken.

        Raises:
            OutOfReachError: If neither lies within the range.
        """
        budget = float(parameters["budget"])
        weights = self._weights(parameters)
        ends = dict.fromkeys(self._groups(weights), 1.0)
        if self._ratio(self._plan(parameters, weights, ends)) > budget:
            weights = self._weights(parameters, all_join=True)
        groups = self._groups(weights)
        found = meet(
            groups,
            lambda positions: self._costed(parameters, weights, positions),
            budget,
            self.low,
            self.high,
        )
        inside = [(plan, ratio) for plan, ratio in found if self.low <= ratio <= self.high]
        if not inside:
            raise OutOfReachError(
                f"no scale of these shares costs between {self.low} and {self.high} of dense"
            )
        plan, ratio = min(inside, key=lambda found: abs(found[1] - budget))
        return Proposal(
            parameters=parameters, plan=plan, cost_ratio=ratio, scores=self._scores(plan, budget)
        )

    def _costed(
        self,
        parameters: Parameters,
        weights: Mapping[str, float],
        positions: Mapping[Group, float],
    ) -> tuple[Plan, float]:
        plan = self._plan(parameters, weights, positions)
        return plan, self._ratio(plan)

    def _plan(
        self,
        parameters: Parameters,
        weights: Mapping[str, float],
        positions: Mapping[Group, float],
    ) -> Plan:
        shape, steps = self.dense, []
        budget, total = float(parameters["budget"]), sum(weights.values())
        for step in self.steps:
            rung = step.rung(budget)
            pruner = step.pruner if rung is None else rung.pruner
            thresholds = dict.fromkeys(pruner.sites(self.dense), 0.0)
            if weight := weights[step.label]:
                part = budget ** (weight / total)  # costs of steps multiply
                scales = {
                    group: place / (1.0 - place) if place < 1.0 else math.inf
                    for (label, group), place in positions.items()
                    if label == step.label
                }
                thresholds = step.shares(shape, self.dense, parameters, part, scales)
                shape = pruner.shrink(shape, thresholds)
            steps.append(Step(pruner=pruner, thresholds=thresholds))
        return Plan(steps=tuple(steps))

    def _groups(self, weights: Mapping[str, float]) -> list[Group]:
        """Return the groups of sites of the steps that take part, coarse ones of a step first."""
        present = [step for step in self.steps if weights[step.label]]
        return [(step.label, group) for step in present for group in step.groups(self.dense)]

    def _weights(self, parameters: Parameters, *, all_join: bool = False) -> dict[str, float]:
        """Return each step's part in how the budget is split.

        Args:
            parameters: What is sampled.
            all_join: Let steps take part that are absent.
        """
        learner = parameters.get("learner")
        if all_join and learner == NO_LEARNER:
            learner = self.learners[0]
        weights = {}
        for step in self.steps:
            plays = step.label not in self.learners or step.label == learner
            weights[step.label] = step.weight(parameters) if plays else 0.0
            if plays and all_join and weights[step.label] == 0.0:
                weights[step.label] = 1.0
        return weights

    def _scores(self, plan: Plan, budget: float) -> str:
        """Return the file of scores that a plan's first step can be cut by: others see less."""
        for step, planned in zip(self.steps, plan.steps, strict=True):
            if planned.active:
                rung = step.rung(budget)
                return rung.path if rung is not None and step.pruner.family == "unit" else ""
        return ""

    def _least(self, rung: int) -> float:
        """Return the smallest cost ratio of all steps together, with the learner of that number.

        Raises:
            SweepError: If they cannot stand in one plan.
        """
        neutral = self._neutral(self.low, rung)
        weights = self._weights(neutral)
        try:
            ends = dict.fromkeys(self._groups(weights), 1.0)
            return self._ratio(self._plan(neutral, weights, ends))
        except ValueError as error:
            raise SweepError(f"steps do not go together: {error}") from error

    def _check_padding(self) -> None:
        """Refuse a unit step behind one that may pad heads: the padding is masked weights."""
        behind = [s.label for s in self.steps[len(self.learners) :] if s.pruner.family == "unit"]
        for step in self.steps:
            pruner = step.pruner
            pads = isinstance(pruner, LearnedPruner) and set(pruner.units) & set(RAGGED)
            if pads and behind:
                raise SweepError(
                    f"steps hold {behind[0]} behind {step.label}, which may leave heads of "
                    f"different widths; give {step.label} other units, or no {behind[0]}"
                )

    def _ratio(self, plan: Plan) -> float:
        return getattr(cost_of(plan.shape(self.dense)), self.cost_name) / self.dense_cost

    def _budgets(self, count: int) -> list[float]:
        """Return budgets of first plans, from coarse to fine."""
        if count == 1:
            return [(self.low + self.high) / 2]
        budgets = np.linspace(self.low, self.high, count)
        return budgets[farthest_first(budgets[:, None])].tolist()

    def _neutral(self, budget: float, rung: int) -> Parameters:
        """Return the parameters of all steps together, as the methods allocate themselves."""
        parameters: Parameters = dict.fromkeys(self.choices(), True)
        if self.learners:
            parameters["learner"] = self.learners[rung % len(self.learners)]
        parameters["budget"] = budget
        for step in self.steps:
            parameters |= step.neutral(self.dense)
        return parameters

    def _alone(self, parameters: Parameters, step: SpaceStep) -> Parameters:
        """Return parameters in which the other steps are absent."""
        alone = dict(parameters)
        if self.learners:
            alone["learner"] = step.label if step.label in self.learners else NO_LEARNER
        for other in self.steps:
            if other.label != step.label and other.label not in self.learners:
                absent = (
                    {f"{other.label}.split": 0.0}
                    if other.deviates
                    else {f"{other.label}.present": False}
                )
                alone |= absent
        return alone
