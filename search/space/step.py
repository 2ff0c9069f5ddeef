"""One step of a search space: its method, the parameters sampled for it, and the shares it cuts.

How shares depend on parameters is a class each: `search.space.deviating` moves a method's own
allocation, `search.space.sampled` samples the shares themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from pruners import Pruner, ViTShape
from pruners.families.learned import LearnedPruner
from pruners.model.sites import KINDS, WIDTH, block_of, kind_of
from search.space.allocation import Allocation

Parameters = dict[str, float | bool | str]
"""Values of an Optuna trial's parameters, by name."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A step's method, measured on the dense model; if it learns for a budget, one per budget.

    Attributes:
        pruner: The method, with the budget among its options where it learns for one.
        own: Its own allocations.
        path: File of its scores, and of weights that were learned with them; empty without scores.
    """

    pruner: Pruner
    own: Allocation
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class SpaceStep(ABC):
    """A step of the space.

    Attributes:
        label: Its name in parameters.
        pruner: Its method.
        max_share: Largest share of a site that may go, but for branches that the method removes
            whole.
        budgets: Budgets that a learned method learns for.
        rungs: Measurements of the method on the dense model; none before it is measured.
    """

    label: str
    pruner: Pruner
    max_share: float
    budgets: tuple[float, ...] = ()
    rungs: tuple[Rung, ...] = ()

    @abstractmethod
    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return the bounds of the step's parameters that are numbers."""

    @abstractmethod
    def choices(self) -> dict[str, list[bool]]:
        """Return the values of the step's parameters that are choices."""

    @abstractmethod
    def neutral(self, dense: ViTShape) -> Parameters:
        """Return the numbers of the method's own allocation, or of one share for all sites."""

    @abstractmethod
    def absent(self) -> Parameters:
        """Return the parameters that leave the step out."""

    @abstractmethod
    def weight(self, parameters: Parameters) -> float:
        """Return the step's part in how the budget is split; 0 where it is absent."""

    @abstractmethod
    def shares(
        self,
        shape: ViTShape,
        dense: ViTShape,
        parameters: Parameters,
        budget: float,
        scales: Mapping[str, float],
    ) -> dict[str, float]:
        """Return site -> share that goes.

        Args:
            shape: Shape that earlier steps have left.
            dense: The dense model's shape.
            parameters: Values of the whole space's parameters.
            budget: Cost ratio that this step has to reach by itself.
            scales: Group of sites -> scale, turned until the plan's cost meets its budget: 1
                changes nothing, at infinity each site is at its `max_share`.
        """

    def refined(self) -> SpaceStep:
        """Return the step with a parameter per site; itself where there is no such step."""
        return self

    def by_site(self, dense: ViTShape, parameters: Parameters) -> Parameters:
        """Return parameters of a space in which this step is refined; the plan stays the same."""
        return parameters

    def learners(self) -> list[LearnedPruner]:
        """Return the methods that must learn before the trials: one per budget of the step.

        Raises:
            ValueError: If the method does not take one of the budgets.
        """
        if not isinstance(self.pruner, LearnedPruner):
            return []
        return [self.pruner.for_budget(b) for b in self.budgets] or [self.pruner]

    def group(self, site: str) -> str:
        """Return the group of sites that are scaled together: units of one kind."""
        return kind_of(site) if self.pruner.family == "unit" else self.pruner.family

    def groups(self, dense: ViTShape) -> list[str]:
        """Return the groups of the step's sites, those of the fewest units first."""
        units: dict[str, int] = {}
        for site, count in self.pruner.sites(dense).items():
            units[self.group(site)] = max(count, units.get(self.group(site), 0))
        return sorted(units, key=lambda group: units[group])

    def rung(self, budget: float) -> Rung | None:
        """Return the measurement for the nearest budget; None before the method is measured."""
        return min(
            self.rungs,
            key=lambda rung: abs(getattr(rung.pruner, "budget", budget) - budget),
            default=None,
        )

    def pruner_for(self, budget: float) -> Pruner:
        """Return the method, as it was measured for the nearest budget."""
        rung = self.rung(budget)
        return self.pruner if rung is None else rung.pruner


def last_block(dense: ViTShape) -> int:
    """Return the number of the last block; 1 for a single one, which lies at depth -1 then."""
    return max(1, len(dense.blocks) - 1)


def depth(site: str, last: int) -> float:
    """Return the depth of a site's block, from -1 (first block) to 1 (last); 0 of the width."""
    return 0.0 if site == WIDTH else 2.0 * block_of(site) / last - 1.0


def branch(site: str) -> str:
    """Return the branch of a site, "attn" or "mlp"; empty for tokens and blocks."""
    kind = kind_of(site)
    if kind in KINDS:
        return KINDS[kind]
    parts = site.split(".")
    return parts[2] if len(parts) > 3 else ""
