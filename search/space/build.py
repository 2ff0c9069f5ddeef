"""Builds the space of a sweep, and checks that its steps go together and reach the budget."""

from __future__ import annotations

from pruners import Plan, Step, ViTShape, cost_of, load_method
from pruners.families.learned import LearnedPruner
from pruners.families.unit import UnitPruner
from pruners.model.sites import RAGGED, WIDTH
from pruners.model.width import narrowed
from search.space.absolute import budget_in_shares
from search.space.deviating import ResidualStep
from search.space.sampled import LayerStep, TiedStep
from search.space.space import Space
from search.space.step import SpaceStep
from search.sweep.parts import StepSpec
from search.sweep.spec import Sweep, SweepError

STEPS: dict[str, type[SpaceStep]] = {
    "residual": ResidualStep,
    "tied": TiedStep,
    "layer": LayerStep,
}
"""Value of a step's key `space` -> its class."""


def build_space(sweep: Sweep, dense: ViTShape) -> Space:
    """Return the space of a sweep over a model of the given shape, before methods are measured.

    Raises:
        SweepError: If a method or an option is unknown, the order of the steps is wrong, or the
            budget is out of reach.
    """
    cost = "effective_macs" if sweep.cost == "effective_gmacs" else "macs"
    budget = budget_in_shares(sweep, dense, getattr(cost_of(dense), cost))
    space = Space(
        dense=dense,
        cost=cost,
        low=budget.low,
        high=budget.high,
        ladder_budgets=sweep.ladder,
        alone_budgets=sweep.alone,
        steps=tuple(
            space_step(label, spec, sweep.epochs)
            for label, spec in zip(sweep.labels, sweep.steps, strict=True)
        ),
    )
    check_space(space, sweep.cost)
    return space


def check_space(space: Space, cost: str) -> None:
    """Check that the steps stand in an order that is possible, and reach the budget.

    Methods that are measured cut at least as far, so that a space checked before stays right.

    Args:
        space: The space.
        cost: The sweep's name of the cost.

    Raises:
        SweepError: If they do not.
    """
    _check_order(space)
    _check_padding(space)
    _check_width(space)
    least = min(_least_cost(space, place) for place in range(max(1, len(space.learners))))
    if least > space.low:
        raise SweepError(
            f"budget is [{space.low:.6g}, {space.high:.6g}] of the dense {cost}; these steps "
            f"reach {least:.3f} at their max_share, so give a larger lower end or more steps"
        )


def space_step(label: str, spec: StepSpec, epochs: int) -> SpaceStep:
    """Build a step of a sweep whose trials are fine-tuned for some epochs.

    Raises:
        SweepError: If a method or an option is unknown, or if options do not go together.
    """
    try:
        pruner = load_method(spec.method, **spec.options)
    except (ValueError, TypeError) as error:
        raise SweepError(f"steps: {error}") from error
    if spec.max_share == 1.0 and not pruner.whole_sites:
        raise SweepError(
            f"max_share of step {label} is 1; "
            "give less than 1, only unit methods can remove a whole site"
        )
    if (ramp := pruner.options().get("ramp_epochs", 0)) > epochs:
        raise SweepError(
            f"ramp_epochs of step {label} is {ramp}; give at most the sweep's epochs, {epochs}"
        )
    if spec.budgets and not (isinstance(pruner, LearnedPruner) and pruner.learns_for_a_budget()):
        raise SweepError(
            f"budgets of step {label} are {list(spec.budgets)}; "
            f"give none, {label} does not learn for a budget"
        )
    return STEPS[spec.space](
        label=label, pruner=pruner, max_share=spec.max_share, budgets=spec.budgets
    )


def _check_order(space: Space) -> None:
    labels = [step.label for step in space.steps]
    try:
        Plan(steps=tuple(Step(pruner=step.pruner) for step in space.steps))
        learners = space.learners
    except ValueError as error:
        raise SweepError(str(error)) from error
    if labels[: len(learners)] != learners:
        raise SweepError(
            f"steps are {', '.join(labels)}; give those that learn first: {', '.join(learners)}"
        )


def _check_padding(space: Space) -> None:
    """Refuse a unit step behind one that may pad heads: the padding is masked weights."""
    behind = [s.label for s in space.steps[len(space.learners) :] if s.pruner.family == "unit"]
    for step in space.steps:
        pruner = step.pruner
        pads = isinstance(pruner, LearnedPruner) and set(pruner.units) & set(RAGGED)
        if pads and behind:
            raise SweepError(
                f"steps hold {behind[0]} behind {step.label}, which may leave heads of "
                f"different widths; give {step.label} other units, or no {behind[0]}"
            )


def _check_width(space: Space) -> None:
    """Refuse a token or weight step that does not take each width that a unit step may leave.

    These are multiples of the step's `multiple`, so what takes the least of them takes all.
    """
    others = [step for step in space.steps if step.pruner.family != "unit"]
    for step in space.steps:
        if isinstance(step.pruner, UnitPruner) and WIDTH in step.pruner.sites(space.dense):
            narrow = narrowed(space.dense, min(step.pruner.multiple, space.dense.dim))
            for other in others:
                try:
                    other.pruner.shrink(narrow, dict.fromkeys(other.pruner.sites(narrow), 0.5))
                except ValueError as error:
                    raise SweepError(
                        f"{step.label} has multiple = {step.pruner.multiple}, and may leave a "
                        f"width that {other.label} does not take ({error}); give it another"
                    ) from error


def _least_cost(space: Space, place: int) -> float:
    """Return the smallest cost ratio of all steps together, with the learner at that place.

    Raises:
        SweepError: If they cannot stand in one plan.
    """
    try:
        return space.plans(space.neutral(space.low, place)).least_cost()
    except ValueError as error:
        raise SweepError(f"steps do not go together: {error}") from error
