"""Steps whose shares deviate from the method's own layer-wise allocation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from pruners import ViTShape
from pruners.model.sites import WIDTH, kind_of
from search.space.allocation import unscored_allocation
from search.space.step import Parameters, SpaceStep, branch, depth, last_block

ABSENT = 0.2
"""Largest value of a `split` at which a step does nothing."""

SPREAD = 1.5
"""Log-odds by which a deviation of 1 moves a share."""

SITE_DEVIATION = 2.0
"""Largest deviation of a site: that of a slope and a difference of branches together."""


class DeviatingStep(SpaceStep):
    """Moves the shares of the method's own allocation, site by site, in their log-odds.

    Its part in how the budget is split is a parameter, `split`.
    """

    @abstractmethod
    def deviation(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the deviation of a site, -2 to 2; `last` is the number of the last block."""

    def choices(self) -> dict[str, list[bool]]:
        """Return no choices: `split` leaves the step out."""
        return {}

    def neutral(self, dense: ViTShape) -> Parameters:
        """Return the numbers of the method's own allocation."""
        neutral: Parameters = dict.fromkeys(self.ranges(dense), 0.0)
        return neutral | {f"{self.label}.split": 1.0}

    def absent(self) -> Parameters:
        """Return the parameters that leave the step out."""
        return {f"{self.label}.split": 0.0}

    def weight(self, parameters: Parameters) -> float:
        """Return the step's part in how the budget is split; 0 where it is absent."""
        split = float(parameters[f"{self.label}.split"])
        return max(0.0, split - ABSENT) / (1.0 - ABSENT)

    def shares(
        self,
        shape: ViTShape,
        dense: ViTShape,
        parameters: Parameters,
        budget: float,
        scales: Mapping[str, float],
    ) -> dict[str, float]:
        """Return site -> share that goes; a scale is the exponent of the budget."""
        rung = self.rung(float(parameters["budget"]))
        pruner = self.pruner if rung is None else rung.pruner
        own = unscored_allocation(pruner, dense, self.max_share) if rung is None else rung.own
        proposed = {
            group: own.at(budget**scale if scale < math.inf else 0.0)
            for group, scale in scales.items()
        }
        last, found = last_block(dense), {}
        for site, units in pruner.sites(shape).items():
            share = proposed[self.group(site)][site]
            moved = deviated(share, self.deviation(site, parameters, last))
            found[site] = self._allowed(site, units, share, moved)
        return found

    def _allowed(self, site: str, units: int, own: float, share: float) -> float:
        """Cap a share; a site goes whole only where the method itself removes it whole.

        Its own allocation is above `max_share` only on the way to a whole site.
        """
        if kind_of(site) == "block":
            return 1.0 if share >= 0.5 else 0.0
        if own > self.max_share and share * units + 0.5 >= units:
            return 1.0
        return min(share, self.max_share)


class ResidualStep(DeviatingStep):
    """Deviates by a slope over depth, a difference between MLP and attention, and the width."""

    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return the bounds of `split` and `slope`, and of `mlp` and `width` where they are cut.

        `mlp` is there where both branches are.
        """
        ranges = {f"{self.label}.split": (0.0, 1.0), f"{self.label}.slope": (-1.0, 1.0)}
        sites = self.pruner.sites(dense)
        if len({branch(site) for site in sites} & {"attn", "mlp"}) == 2:
            ranges[f"{self.label}.mlp"] = (-1.0, 1.0)
        if WIDTH in sites:
            ranges[f"{self.label}.{WIDTH}"] = (-1.0, 1.0)
        return ranges

    def deviation(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the deviation of a site, -2 to 2; `last` is the number of the last block."""
        if site == WIDTH:
            return float(parameters[f"{self.label}.{WIDTH}"])
        side = {"mlp": 1.0, "attn": -1.0}.get(branch(site), 0.0)
        slope = float(parameters[f"{self.label}.slope"])
        return slope * depth(site, last) + side * float(parameters.get(f"{self.label}.mlp", 0.0))

    def refined(self) -> SiteStep:
        """Return the step with a deviation per site."""
        return SiteStep(**{field.name: getattr(self, field.name) for field in fields(self)})

    def by_site(self, dense: ViTShape, parameters: Parameters) -> Parameters:
        """Return parameters of a space in which this step is refined; the plan stays the same."""
        last, own = last_block(dense), self.ranges(dense)
        others = {name: value for name, value in parameters.items() if name not in own}
        split = f"{self.label}.split"
        return (
            others
            | {split: parameters[split]}
            | {
                f"{self.label}.{site}": self.deviation(site, parameters, last)
                for site in self.pruner.sites(dense)
            }
        )


class SiteStep(DeviatingStep):
    """Deviates by a number for each site."""

    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return the bounds of `split` and of each site's deviation."""
        bounds = (-SITE_DEVIATION, SITE_DEVIATION)
        sites = {f"{self.label}.{site}": bounds for site in self.pruner.sites(dense)}
        return {f"{self.label}.split": (0.0, 1.0)} | sites

    def deviation(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the deviation of a site, -2 to 2."""
        return float(parameters[f"{self.label}.{site}"])


def deviated(share: float, deviation: float) -> float:
    """Move a share by `SPREAD` times a deviation in its log-odds; 0 and 1 stay."""
    if share <= 0.0 or share >= 1.0 or deviation == 0.0:
        return share
    odds = share / (1.0 - share) * float(np.exp(SPREAD * deviation))
    return odds / (1.0 + odds)
