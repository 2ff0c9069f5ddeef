"""One step of a search space: its method, what is sampled for it, and the shares that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pruners import Pruner, ViTShape, load_method
from pruners.families.learned import LearnedPruner
from pruners.model.sites import KINDS, kind_of
from search.space.allocation import OwnShares, everything
from search.sweep.parts import StepSpec
from search.sweep.spec import SweepError

Parameters = dict[str, float | bool | str]
"""What an Optuna trial samples, by name."""

ABSENT = 0.2
"""Largest value of a `split` at which a step does nothing."""

SPREAD = 1.5
"""Log-odds by which a deviation of 1 moves a share."""

SITE_DEVIATION = 2.0
"""Largest deviation of a site: that of a slope and a difference of branches together."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What is known of a step's method on the dense model; of one that learns, for one budget.

    Attributes:
        pruner: The method, with the budget among its options where it learns for one.
        own: Its own allocations.
        path: File of its scores, and of weights that were learned with them; empty without scores.
    """

    pruner: Pruner
    own: OwnShares
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class SpaceStep:
    """A step of the space.

    Attributes:
        label: Its name in parameters.
        pruner: Its method.
        kind: How its shares run. "residual" deviates from the method's own allocation by a slope
            over depth and a difference between MLP and attention, "site" by a number for each site;
            "tied" samples a base and a slope for the shares themselves, "layer" a share per site.
        max_share: What a site may lose at most, but for branches that the method removes whole.
        budgets: That a method which learns does so for.
        rungs: What is known of the method on the dense model; nothing before it is measured.
    """

    label: str
    pruner: Pruner
    kind: Literal["tied", "layer", "residual", "site"]
    max_share: float
    budgets: tuple[float, ...] = ()
    rungs: tuple[Rung, ...] = ()

    def learners(self) -> list[LearnedPruner]:
        """Return the methods that must learn before the trials: one per budget of the step."""
        if not isinstance(self.pruner, LearnedPruner):
            return []
        return [self.pruner.for_budget(b) for b in self.budgets] or [self.pruner]

    @property
    def deviates(self) -> bool:
        """Whether shares start from the method's own allocation."""
        return self.kind in ("residual", "site")

    def group(self, site: str) -> str:
        """Return the group of sites that are scaled together: units of one kind."""
        return kind_of(site) if self.pruner.family == "unit" else self.pruner.family

    def groups(self, dense: ViTShape) -> list[str]:
        """Return the groups of the step's sites, those of the fewest units first."""
        units: dict[str, int] = {}
        for site, count in self.pruner.sites(dense).items():
            units[self.group(site)] = max(count, units.get(self.group(site), 0))
        return sorted(units, key=lambda group: units[group])

    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return what is sampled for the step, and within which bounds."""
        sites = self.pruner.sites(dense)
        if self.kind == "tied":
            return {f"{self.label}.base": (0.05, 1.0), f"{self.label}.slope": (-1.0, 1.0)}
        if self.kind == "layer":
            return {f"{self.label}.{site}": (0.0, 1.0) for site in sites}
        ranges = {f"{self.label}.split": (0.0, 1.0)}
        if self.kind == "site":
            bounds = (-SITE_DEVIATION, SITE_DEVIATION)
            return ranges | {f"{self.label}.{site}": bounds for site in sites}
        ranges[f"{self.label}.slope"] = (-1.0, 1.0)
        if len({_branch(site) for site in sites} & {"attn", "mlp"}) == 2:
            ranges[f"{self.label}.mlp"] = (-1.0, 1.0)
        return ranges

    def neutral(self, dense: ViTShape) -> Parameters:
        """Return the parameters of the method's own allocation, or of one share for all sites."""
        middle = {"tied": 0.5, "layer": 0.5, "residual": 0.0, "site": 0.0}[self.kind]
        known = {f"{self.label}.split": 1.0, f"{self.label}.slope": 0.0}
        return {name: known.get(name, middle) for name in self.ranges(dense)}

    def weight(self, parameters: Parameters) -> float:
        """Return the step's part in how the budget is split; 0 where it is absent."""
        if not self.deviates:
            return float(bool(parameters.get(f"{self.label}.present", True)))
        split = float(parameters[f"{self.label}.split"])
        return max(0.0, split - ABSENT) / (1.0 - ABSENT)

    def rung(self, budget: float) -> Rung | None:
        """Return what is known for the budget that is nearest; None if nothing is."""
        return min(
            self.rungs,
            key=lambda rung: abs(getattr(rung.pruner, "budget", budget) - budget),
            default=None,
        )

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
            shape: What earlier steps have left.
            dense: The dense model's shape.
            parameters: What is sampled.
            budget: What this step has to reach by itself.
            scales: Group of sites -> what is turned until the plan's cost meets its budget: 1
                changes nothing, at infinity each site is at its `max_share`.
        """
        rung = self.rung(float(parameters["budget"]))
        pruner = self.pruner if rung is None else rung.pruner
        sites = pruner.sites(shape)
        last = max(1, len(dense.blocks) - 1)
        if not self.deviates:
            return {
                site: _scaled(
                    self._raw(site, parameters, last), scales[self.group(site)], self.max_share
                )
                if kind_of(site) != "block"
                else 0.0
                for site in sites
            }
        own = rung.own if rung is not None else everything(pruner, dense, self.max_share)
        shares = {
            group: own.at(budget**scale if scale < math.inf else 0.0)
            for group, scale in scales.items()
        }
        found = {}
        for site, units in sites.items():
            proposed = shares[self.group(site)][site]
            share = deviated(proposed, self.deviation(site, parameters, last))
            found[site] = self._allowed(site, units, proposed, share)
        return found

    def deviation(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the deviation of a site, -2 to 2; `last` is the number of the last block."""
        if self.kind == "site":
            return float(parameters[f"{self.label}.{site}"])
        side = {"mlp": 1.0, "attn": -1.0}.get(_branch(site), 0.0)
        slope = float(parameters[f"{self.label}.slope"])
        return slope * _depth(site, last) + side * float(parameters.get(f"{self.label}.mlp", 0.0))

    def by_site(self, dense: ViTShape, parameters: Parameters) -> Parameters:
        """Return residual parameters as those of the kind "site", exactly."""
        last = max(1, len(dense.blocks) - 1)
        name = f"{self.label}.split"
        return {name: parameters[name]} | {
            f"{self.label}.{site}": self.deviation(site, parameters, last)
            for site in self.pruner.sites(dense)
        }

    def _raw(self, site: str, parameters: Parameters, last: int) -> float:
        if self.kind == "layer":
            return float(parameters[f"{self.label}.{site}"])
        base, slope = (float(parameters[f"{self.label}.{k}"]) for k in ("base", "slope"))
        return base * (1.0 + slope * _depth(site, last))

    def _allowed(self, site: str, units: int, own: float, share: float) -> float:
        """Cap a share; only what the method itself removes whole goes whole.

        Its own allocation is above `max_share` only on the way to a whole site.
        """
        if kind_of(site) == "block":
            return 1.0 if share >= 0.5 else 0.0
        if own > self.max_share and share * units + 0.5 >= units:
            return 1.0
        return min(share, self.max_share)


def deviated(share: float, deviation: float) -> float:
    """Move a share by `SPREAD` times a deviation in its log-odds; 0 and 1 stay."""
    if share <= 0.0 or share >= 1.0 or deviation == 0.0:
        return share
    odds = share / (1.0 - share) * float(np.exp(SPREAD * deviation))
    return odds / (1.0 + odds)


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
    return SpaceStep(
        label=label,
        pruner=pruner,
        kind=spec.space,
        max_share=spec.max_share,
        budgets=spec.budgets,
    )


def refined(step: SpaceStep) -> SpaceStep:
    """Return a step that deviates with a number of its own for each site."""
    return dataclasses.replace(step, kind="site") if step.kind == "residual" else step


def _scaled(share: float, scale: float, most: float) -> float:
    return min(most, share * scale) if share > 0.0 else 0.0


def _depth(site: str, last: int) -> float:
    """Return where a site lies, from -1 (first block) to 1 (last)."""
    return 2.0 * int(site.split(".")[1]) / last - 1.0


def _branch(site: str) -> str:
    """Return "attn" or "mlp", or nothing for tokens and blocks."""
    kind = kind_of(site)
    if kind in KINDS:
        return KINDS[kind]
    parts = site.split(".")
    return parts[2] if len(parts) > 3 else ""
