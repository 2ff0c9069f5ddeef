"""The search space: Optuna parameters, and the plans they mean, each within the MACs budget.

A trial samples a budget and, for each step, whether it is present and how its shares run over the
depth. The shares are then scaled by one common factor so that the plan's cost meets the budget:
what is sampled says *how* the network shrinks, the budget says *how much*. The space is static
(every parameter exists in every trial), as Gaussian-process samplers need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruners import Plan, Pruner, Step, ViTShape, cost_of, load_method
from pruners.weight_pruner import WeightPruner
from search.sweep import StepSpec, Sweep, SweepError

if TYPE_CHECKING:
    import optuna

Parameters = dict[str, float | bool]


class OutOfReachError(ValueError):
    """No scale of the sampled shares brings the cost into the sweep's budget range."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan to try and what it will cost, known before training."""

    parameters: Parameters
    plan: Plan
    cost_ratio: float
    """Cost after the plan as a share of the dense model's, in the sweep's chosen cost."""


@dataclass(frozen=True, kw_only=True)
class SpaceStep:
    """A step of the space: its method, its label in parameter names, how its shares run."""

    label: str
    pruner: Pruner
    layered: bool
    max_share: float


class Space:
    """Proposes parameters and turns them into plans."""

    def __init__(self, sweep: Sweep, dense: ViTShape) -> None:
        """Prepare the space of a sweep over a model of the given shape.

        Raises:
            SweepError: If a method or an option is unknown, the order of the steps is wrong, or the
                budget is out of reach.
        """
        self.dense = dense
        self.cost_name = {"gmacs": "macs", "effective_gmacs": "effective_macs"}[sweep.cost]
        self.dense_cost = getattr(cost_of(dense), self.cost_name)
        self.low, self.high = sweep.budget.low, sweep.budget.high
        self.rungs = sweep.ladder
        self.steps = tuple(
            _space_step(label, spec, sweep.epochs)
            for label, spec in zip(sweep.labels, sweep.steps, strict=True)
        )
        try:
            Plan(steps=tuple(Step(pruner=step.pruner) for step in self.steps))
        except ValueError as error:
            raise SweepError(str(error)) from error
        least = self._ratio(self._plan(self._uniform(self.low), math.inf))
        if least > self.low:
            raise SweepError(
                f"budget is [{self.low}, {self.high}] of the dense {sweep.cost}; these steps "
                f"reach {least:.3f} at their max_share, so give a larger lower end or more steps"
            )

    def sample(self, trial: optuna.Trial) -> Parameters:
        """Ask an Optuna trial for all parameters of the space."""
        parameters: Parameters = {"budget": trial.suggest_float("budget", self.low, self.high)}
        for step in self.steps:
            parameters[f"{step.label}.present"] = trial.suggest_categorical(
                f"{step.label}.present", [True, False]
            )
            if step.layered:
                for site in step.pruner.sites(self.dense):
                    parameters[f"{step.label}.{site}"] = trial.suggest_float(
                        f"{step.label}.{site}", 0.0, 1.0
                    )
            else:
                parameters[f"{step.label}.base"] = trial.suggest_float(
                    f"{step.label}.base", 0.05, 1.0
                )
                parameters[f"{step.label}.slope"] = trial.suggest_float(
                    f"{step.label}.slope", -1.0, 1.0
                )
        return parameters

    def ladder(self) -> list[Parameters]:
        """Return the parameters of uniform plans (one share everywhere), small budgets first."""
        if self.rungs < 2:
            return [self._uniform((self.low + self.high) / 2)] * self.rungs
        gap = (self.high - self.low) / (self.rungs - 1)
        return [self._uniform(self.low + gap * rung) for rung in range(self.rungs)]

    def propose(self, parameters: Parameters) -> Proposal:
        """Return the plan of some parameters, scaled to the sampled budget.

        Steps that are absent join if the others alone cannot reach the budget: refusing such
        parameters would teach a sampler nothing, and it would propose them again. Of the two plans
        around the budget (units are whole) the nearer one within the sweep's range is taken.

        Raises:
            OutOfReachError: If neither lies within the range.
        """
        budget = float(parameters["budget"])
        if self._ratio(self._plan(parameters, math.inf)) > budget:
            present = {f"{step.label}.present": True for step in self.steps}
            parameters = {**parameters, **present}
        below, above = self._bracket(parameters, budget)
        inside = [
            p for p in (below, above) if p is not None and self.low <= self._ratio(p) <= self.high
        ]
        if not inside:
            raise OutOfReachError(
                f"no scale of these shares costs between {self.low} and {self.high} of dense"
            )
        plan = min(inside, key=lambda p: abs(self._ratio(p) - budget))
        return Proposal(parameters=parameters, plan=plan, cost_ratio=self._ratio(plan))

    def _bracket(self, parameters: Parameters, budget: float) -> tuple[Plan | None, Plan]:
        """Return the plan with the largest cost <= budget, if any, and the next larger one.

        The shares are scaled by t / (1 - t) for t in 0..1: at 1 each is at its `max_share`.
        """
        low, high = 0.0, 1.0
        below = self._plan(parameters, math.inf)
        if self._ratio(below) > budget:
            return None, below
        for _ in range(30):  # finer than one unit of any site but the largest weight matrices
            middle = (low + high) / 2
            plan = self._plan(parameters, middle / (1.0 - middle))
            if self._ratio(plan) <= budget:
                high, below = middle, plan
            else:
                low = middle
        return below, self._plan(parameters, low / (1.0 - low))

    def _plan(self, parameters: Mapping[str, float | bool], scale: float) -> Plan:
        shape, steps = self.dense, []
        for step in self.steps:
            thresholds = dict.fromkeys(step.pruner.sites(self.dense), 0.0)
            if parameters[f"{step.label}.present"]:
                sites = step.pruner.sites(shape)  # an earlier step may have removed branches
                raw = {site: self._raw_share(step, site, parameters) for site in sites}
                thresholds = {
                    s: min(step.max_share, scale * share) if share else 0.0
                    for s, share in raw.items()
                }
                shape = step.pruner.shrink(shape, thresholds)
            steps.append(Step(pruner=step.pruner, thresholds=thresholds))
        return Plan(steps=tuple(steps))

    def _raw_share(
        self, step: SpaceStep, site: str, parameters: Mapping[str, float | bool]
    ) -> float:
        if step.layered:
            return float(parameters[f"{step.label}.{site}"])
        depth = int(site.split(".")[1]) / max(1, len(self.dense.blocks) - 1)
        base, slope = (
            float(parameters[f"{step.label}.base"]),
            float(parameters[f"{step.label}.slope"]),
        )
        return base * (1.0 + slope * (2.0 * depth - 1.0))

    def _ratio(self, plan: Plan) -> float:
        return getattr(cost_of(plan.shape(self.dense)), self.cost_name) / self.dense_cost

    def _uniform(self, budget: float) -> Parameters:
        parameters: Parameters = {"budget": budget}
        for step in self.steps:
            parameters[f"{step.label}.present"] = True
            if step.layered:
                parameters |= {
                    f"{step.label}.{site}": 0.5 for site in step.pruner.sites(self.dense)
                }
            else:
                parameters |= {f"{step.label}.base": 0.5, f"{step.label}.slope": 0.0}
        return parameters


def _space_step(label: str, spec: StepSpec, epochs: int) -> SpaceStep:
    try:
        pruner = load_method(spec.method, **spec.options)
    except (ValueError, TypeError) as error:
        raise SweepError(f"steps: {error}") from error
    if spec.max_share == 1.0 and not pruner.whole_sites:
        raise SweepError(
            f"max_share of step {label} is 1; "
            "give less than 1, only unit methods can remove a whole site"
        )
    if isinstance(pruner, WeightPruner) and pruner.ramp_epochs > epochs:
        raise SweepError(
            f"ramp_epochs of step {label} is {pruner.ramp_epochs}; "
            f"give at most the sweep's epochs, {epochs}"
        )
    return SpaceStep(
        label=label, pruner=pruner, layered=spec.space == "layer", max_share=spec.max_share
    )
