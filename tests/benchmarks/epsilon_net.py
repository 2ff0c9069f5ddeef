"""The other rule of MO-ASHA: non-domination rank, then spread by an epsilon-net.

What `search.strategy.rungs.within_band` is measured against in `halving_rules.py`.
"""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.space.farthest import farthest_first
from search.strategy.rungs import Floats


def within_net(costs: Floats, top1s: Floats, candidate: int, eta: float) -> bool:
    """Say whether a result is among the best 1/eta by non-domination rank, then by spread.

    The first eta results may go on.
    MO-ASHA with the epsilon-net (Schmucker et al., 2021, arXiv:2106.12639; Salinas et al., 2021,
    arXiv:2106.05680). Where they leave it open, a front's first point is its most accurate.
    """
    if len(costs) <= eta:
        return True
    return bool(net_positions(costs, top1s)[candidate] * eta <= len(costs))


def net_positions(costs: Floats, top1s: Floats) -> NDArray[np.int64]:
    """Return the position [n] of each result, 1 for the best; equal results share theirs.

    Objectives are scaled to the range that the rung's results span.
    """
    points, inverse, counts = np.unique(
        np.column_stack([-top1s, costs]), axis=0, return_inverse=True, return_counts=True
    )
    span = np.ptp(points, axis=0)
    scaled = points / np.where(span > 0.0, span, 1.0)
    rank = ranks(points[:, 1], -points[:, 0])
    order = np.concatenate(
        [
            members[farthest_first(scaled[members])]
            for members in (np.flatnonzero(rank == level) for level in range(rank.max() + 1))
        ]
    )
    before = np.cumsum(counts[order]) - counts[order]
    positions = np.empty(len(points), dtype=np.int64)
    positions[order] = before + 1
    return positions[inverse.ravel()]


def ranks(costs: ArrayLike, top1s: ArrayLike) -> NDArray[np.int64]:
    """Return the non-domination rank of each point [n]: 0 on the front, 1 once that is gone, ...

    Equal points share a rank (Deb et al., 2002, NSGA-II, section III.A).
    """
    points = np.column_stack([np.asarray(costs, float), -np.asarray(top1s, float)])
    if not len(points):
        return np.zeros(0, dtype=np.int64)
    return np.asarray(moocore.pareto_rank(points), dtype=np.int64)
