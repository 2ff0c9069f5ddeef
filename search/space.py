"""The search space: Optuna parameters, and the plans they mean, each within the MACs budget.

A trial samples a budget and, for each step, whether it is present and how its shares run over the
depth. The shares are then scaled by one common factor so that the plan's cost meets the budget:
what is sampled says *how* the network shrinks, the budget says *how much*. The space is static
(every parameter exists in every trial), as Gaussian-process samplers need.

Steps that learn are alternatives, since each has learned of the dense model: a trial takes one of
them or none. Their shares deviate from what they propose themselves for the trial's budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruners import Plan, Step, ViTShape, cost_of
from pruners.learned import LearnedPruner
from pruners.pruner import Thresholds
from pruners.sites import RAGGED
from search.space_step import Parameters, Rung, SpaceStep, space_step
from search.sweep import Sweep, SweepError

if TYPE_CHECKING:
    import optuna

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
    learned: str = ""
    """File of what the plan's first step has learned; empty if it does not learn."""


class Space:
    """Proposes parameters and turns them into plans."""

    def __init__(
        self,
        sweep: Sweep,
        dense: ViTShape,
        learned: Mapping[str, Sequence[Rung]] | None = None,
    ) -> None:
        """Prepare the space of a sweep over a model of the given shape.

        Args:
            sweep: The sweep.
            dense: Shape of the dense model.
            learned: Label -> what the step has learned, for each step that learns. Without it only
                what can be reached is right, not how the shares of such steps run.

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
            space_step(label, spec, sweep.epochs)
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
        self.learned = learned or {}
        self._own: dict[tuple[str, float], Thresholds] = {}
        least = min(self._least(rung) for rung in range(max(1, len(self.learners))))
        if least > self.low:
            raise SweepError(
                f"budget is [{self.low}, {self.high}] of the dense {sweep.cost}; these steps "
                f"reach {least:.3f} at their max_share, so give a larger lower end or more steps"
            )

    def sample(self, trial: optuna.Trial) -> Parameters:
        """Ask an Optuna trial for all parameters of the space."""
        parameters: Parameters = {"budget": trial.suggest_float("budget", self.low, self.high)}
        if self.learners:
            choices = [*self.learners, NO_LEARNER]
            parameters["learner"] = trial.suggest_categorical("learner", choices)
        for step in self.steps:
            if step.label not in self.learners:
                parameters[f"{step.label}.present"] = trial.suggest_categorical(
                    f"{step.label}.present", [True, False]
                )
            if step.kind == "layer":
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
        """Return the parameters of the first plans, small budgets first.

        For each budget: every step that learns alone, as it proposes itself, then one share
        everywhere for all other steps together with one of those.
        """
        gap = (self.high - self.low) / max(1, self.rungs - 1)
        start = self.low if self.rungs > 1 else (self.low + self.high) / 2
        plans: list[Parameters] = []
        for rung in range(self.rungs):
            mixed = self._uniform(start + gap * rung, rung)
            absent = {key: False for key in mixed if key.endswith(".present")}
            plans += [{**mixed, **absent, "learner": label} for label in self.learners]
            if absent:
                plans.append(mixed)
        return plans

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
            parameters = {k: k.endswith(".present") or v for k, v in parameters.items()}
            if parameters.get("learner") == NO_LEARNER:
                parameters["learner"] = self.learners[0]
        below, above = self._bracket(parameters, budget)
        inside = [
            p for p in (below, above) if p is not None and self.low <= self._ratio(p) <= self.high
        ]
        if not inside:
            raise OutOfReachError(
                f"no scale of these shares costs between {self.low} and {self.high} of dense"
            )
        plan = min(inside, key=lambda p: abs(self._ratio(p) - budget))
        learner = next((p for p in plan.steps if p.active), None)
        rung = self._rung(str(parameters.get("learner")), budget)
        learns = rung is not None and learner is not None and learner.pruner == rung.pruner
        return Proposal(
            parameters=parameters,
            plan=plan,
            cost_ratio=self._ratio(plan),
            learned=rung.path if rung is not None and learns else "",
        )

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

    def _plan(self, parameters: Parameters, scale: float) -> Plan:
        shape, steps = self.dense, []
        budget = float(parameters["budget"])
        for step in self.steps:
            rung = self._rung(step.label, budget)
            pruner = step.pruner if rung is None else rung.pruner
            thresholds = dict.fromkeys(pruner.sites(self.dense), 0.0)
            if self._is_present(step, parameters):
                sites = pruner.sites(shape)  # an earlier step may have removed branches
                own = self._proposed(step, budget)
                thresholds = {
                    site: step.share(
                        site,
                        units,
                        own.get(site, 0.0) if own else None,
                        parameters,
                        scale,
                        last_block=len(self.dense.blocks) - 1,
                    )
                    for site, units in sites.items()
                }
                shape = pruner.shrink(shape, thresholds)
            steps.append(Step(pruner=pruner, thresholds=thresholds))
        return Plan(steps=tuple(steps))

    def _least(self, rung: int) -> float:
        """Return the smallest cost ratio of all steps together, with the learner of that number.

        Raises:
            SweepError: If they cannot stand in one plan.
        """
        try:
            return self._ratio(self._plan(self._uniform(self.low, rung), math.inf))
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

    def _is_present(self, step: SpaceStep, parameters: Parameters) -> bool:
        if step.label in self.learners:
            return parameters["learner"] == step.label
        return bool(parameters[f"{step.label}.present"])

    def _rung(self, label: str, budget: float) -> Rung | None:
        """Return what a step has learned for the budget that is nearest; None if nothing."""
        rungs = self.learned.get(label, ())
        return min(
            rungs, key=lambda r: abs(getattr(r.pruner, "budget", budget) - budget), default=None
        )

    def _proposed(self, step: SpaceStep, budget: float) -> Thresholds:
        """Return a step's own allocation at a budget, or at the nearest one it can reach."""
        rung = self._rung(step.label, budget)
        if step.kind != "residual" or rung is None:
            return {}
        key = (step.label, budget)
        while key not in self._own:
            try:
                macs = budget * cost_of(self.dense).effective_macs
                self._own[key] = rung.pruner.allocate(self.dense, rung.scores, macs)
            except ValueError:  # this step alone cannot get there
                budget += 0.01
        return self._own[key]

    def _ratio(self, plan: Plan) -> float:
        return getattr(cost_of(plan.shape(self.dense)), self.cost_name) / self.dense_cost

    def _uniform(self, budget: float, rung: int = 0) -> Parameters:
        parameters: Parameters = {"budget": budget}
        if self.learners:
            parameters["learner"] = self.learners[rung % len(self.learners)]
        for step in self.steps:
            if step.label not in self.learners:
                parameters[f"{step.label}.present"] = True
            if step.kind == "layer":
                parameters |= {
                    f"{step.label}.{site}": 0.5 for site in step.pruner.sites(self.dense)
                }
            else:
                parameters |= {f"{step.label}.base": 0.5, f"{step.label}.slope": 0.0}
        return parameters
