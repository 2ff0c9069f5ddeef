"""One step of a search space: its method, and how its shares follow from what is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pruners import Pruner, load_method
from pruners.learned import LearnedPruner
from pruners.pruner import Scores
from pruners.sites import kind_of
from search.sweep import StepSpec, SweepError

Parameters = dict[str, float | bool | str]
"""What an Optuna trial samples, by name."""


@dataclass(frozen=True, kw_only=True)
class SpaceStep:
    """A step of the space: its method, its label in parameter names, how its shares run."""

    label: str
    pruner: Pruner
    kind: Literal["tied", "layer", "residual"]
    max_share: float
    budgets: tuple[float, ...] = ()

    def learners(self) -> list[LearnedPruner]:
        """Return the methods that must learn before the trials: one per budget of the step."""
        if not isinstance(self.pruner, LearnedPruner):
            return []
        return [self.pruner.for_budget(b) for b in self.budgets] or [self.pruner]

    def share(
        self,
        site: str,
        units: int,
        own: float | None,
        parameters: Parameters,
        scale: float,
        last_block: int,
    ) -> float:
        """Return the share of a site that goes.

        Blocks and whole heads go only where the method itself removes them.

        Args:
            site: The site.
            units: Its number of units.
            own: The share that the method itself proposes; None if it is only sampled.
            parameters: What is sampled.
            scale: What all shares of a plan are multiplied by.
            last_block: Number of the network's last block.
        """
        if kind_of(site) == "block":
            return 1.0 if own == 1.0 and scale >= 0.5 else 0.0
        if self.kind == "layer":
            raw = float(parameters[f"{self.label}.{site}"])
        else:
            depth = int(site.split(".")[1]) / max(1, last_block)
            base, slope = (float(parameters[f"{self.label}.{k}"]) for k in ("base", "slope"))
            raw = base * (1.0 + slope * (2.0 * depth - 1.0))
            raw *= 1.0 if own is None else 2.0 * own
        if raw == 0.0:
            return 0.0
        if own == 1.0 and scale * raw * units + 0.5 >= units:
            return 1.0
        return min(self.max_share, scale * raw)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What a step has learned for one budget.

    Attributes:
        pruner: The method, with the budget among its options.
        scores: Site -> scores.
        path: File of scores and weights.
    """

    pruner: LearnedPruner
    scores: Scores
    path: str


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
    learns = isinstance(pruner, LearnedPruner)
    if spec.space == "residual" and not learns:
        raise SweepError(
            f"space of step {label} is 'residual'; give 'tied' or 'layer', {label} learns nothing"
        )
    if spec.budgets and not (isinstance(pruner, LearnedPruner) and pruner.learns_for_a_budget()):
        raise SweepError(
            f"budgets of step {label} are {list(spec.budgets)}; "
            f"give none, {label} does not learn for a budget"
        )
    return SpaceStep(
        label=label,
        pruner=pruner,
        kind=spec.space or ("residual" if learns else "tied"),
        max_share=spec.max_share,
        budgets=spec.budgets,
    )
