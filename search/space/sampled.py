"""Steps whose shares are sampled themselves, whatever the method would allocate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from pruners import ViTShape
from pruners.model.sites import kind_of
from search.space.step import Parameters, SpaceStep, depth, last_block


class SampledStep(SpaceStep):
    """Samples shares, and scales them up or down until the budget is met.

    Whether it takes part is a parameter, `present`.
    """

    @abstractmethod
    def sampled(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the sampled share of a site; `last` is the number of the last block."""

    def choices(self) -> dict[str, list[bool]]:
        """Return the values of `present`."""
        return {f"{self.label}.present": [True, False]}

    def absent(self) -> Parameters:
        """Return the parameters that leave the step out."""
        return {f"{self.label}.present": False}

    def weight(self, parameters: Parameters) -> float:
        """Return the step's part in how the budget is split; 0 where it is absent."""
        return float(bool(parameters.get(f"{self.label}.present", True)))

    def shares(
        self,
        shape: ViTShape,
        dense: ViTShape,
        parameters: Parameters,
        budget: float,
        scales: Mapping[str, float],
    ) -> dict[str, float]:
        """Return site -> share that goes, sampled share times scale; blocks stay."""
        last, found = last_block(dense), {}
        for site in self.pruner_for(float(parameters["budget"])).sites(shape):
            share = self.sampled(site, parameters, last)
            if kind_of(site) == "block" or share <= 0.0:
                found[site] = 0.0
            else:
                found[site] = min(self.max_share, share * scales[self.group(site)])
        return found


class TiedStep(SampledStep):
    """Samples a base and a slope over depth, for all sites."""

    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return the bounds of `base` and `slope`."""
        return {f"{self.label}.base": (0.05, 1.0), f"{self.label}.slope": (-1.0, 1.0)}

    def neutral(self, dense: ViTShape) -> Parameters:
        """Return the numbers of one share for all sites."""
        return {f"{self.label}.base": 0.5, f"{self.label}.slope": 0.0}

    def sampled(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the sampled share of a site; `last` is the number of the last block."""
        base, slope = (float(parameters[f"{self.label}.{k}"]) for k in ("base", "slope"))
        return base * (1.0 + slope * depth(site, last))


class LayerStep(SampledStep):
    """Samples a share for each site."""

    def ranges(self, dense: ViTShape) -> dict[str, tuple[float, float]]:
        """Return the bounds of each site's share."""
        return {f"{self.label}.{site}": (0.0, 1.0) for site in self.pruner.sites(dense)}

    def neutral(self, dense: ViTShape) -> Parameters:
        """Return the numbers of one share for all sites."""
        return dict.fromkeys(self.ranges(dense), 0.5)

    def sampled(self, site: str, parameters: Parameters, last: int) -> float:
        """Return the sampled share of a site."""
        return float(parameters[f"{self.label}.{site}"])
