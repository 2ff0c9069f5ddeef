"""A method's own layer-wise allocation at any budget: measured on a grid, interpolated between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pruners import Pruner, ViTShape, cost_of
from pruners.model.sites import kind_of
from pruners.model.types import Scores

GRID = 0.025
"""Distance of the budgets at which allocations are measured, as a share of the dense cost."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A method's own layer-wise allocation at every budget, from nothing cut to all that may go.

    Attributes:
        budgets: [G], ascending from 0 to 1, of effective MACs as shares of the dense model's.
        shares: Site -> [G], from the largest share that may go, at a budget of 0, to 0 at 1.
    """

    budgets: NDArray[np.float64]
    shares: dict[str, NDArray[np.float64]]

    def at(self, budget: float) -> dict[str, float]:
        """Return site -> share at a budget, linear between those of the grid."""
        place = int(np.clip(np.searchsorted(self.budgets, budget), 1, len(self.budgets) - 1))
        low, high = self.budgets[place - 1], self.budgets[place]
        weight = float(np.clip((budget - low) / (high - low), 0.0, 1.0))
        return {
            site: float((1.0 - weight) * grid[place - 1] + weight * grid[place])
            for site, grid in self.shares.items()
        }


def own_allocation(pruner: Pruner, shape: ViTShape, scores: Scores, max_share: float) -> Allocation:
    """Measure a method's allocations at budgets from 1 down to the least that it reaches alone.

    Args:
        pruner: The method.
        shape: Shape of the dense model.
        scores: The method's scores of it.
        max_share: Largest share of a site; more only where the method removes it whole.
    """
    macs, sites = cost_of(shape).effective_macs, pruner.sites(shape)
    budgets, rows = [1.0], [dict.fromkeys(sites, 0.0)]
    for step in range(1, round(1.0 / GRID)):
        budget = 1.0 - step * GRID
        try:
            own = pruner.allocate(shape, scores, budget * macs)
        except ValueError:  # this method alone gets no further
            break
        budgets.append(budget)
        rows.append({site: _allowed(own.get(site, 0.0), max_share) for site in sites})
    budgets.append(0.0)
    rows.append(
        {site: max(rows[-1][site], _most(site, max_share)) for site in sites}
    )  # beyond the least that the method reaches alone
    return Allocation(
        budgets=np.array(budgets[::-1]),
        shares={site: np.array([row[site] for row in rows[::-1]]) for site in sites},
    )


def unscored_allocation(pruner: Pruner, shape: ViTShape, max_share: float) -> Allocation:
    """Return the allocation of an unscored method: every site alike."""
    sites = pruner.sites(shape)
    return Allocation(
        budgets=np.array([0.0, 1.0]),
        shares={site: np.array([_most(site, max_share), 0.0]) for site in sites},
    )


def _allowed(share: float, max_share: float) -> float:
    return share if share == 1.0 else min(share, max_share)


def _most(site: str, max_share: float) -> float:
    """Return the largest share of a site: a block goes only where the method itself removes it."""
    return 0.0 if kind_of(site) == "block" else max_share
