"""Non-domination between cost (lower is better) and accuracy (higher is better)."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray


def front(costs: Sequence[float], accuracies: Sequence[float]) -> NDArray[np.bool_]:
    """Say of each of n points whether no other is at least as good in both and better in one.

    Of equal points only the first counts.

    Raises:
        ValueError: If a value is not a number.
    """
    points = _minimised(costs, accuracies)
    if not len(points):
        return np.zeros(0, dtype=bool)
    first = np.zeros(len(points), dtype=bool)
    first[np.unique(points, axis=0, return_index=True)[1]] = True
    return first & np.asarray(moocore.is_nondominated(points, keep_weakly=True), dtype=bool)


def hypervolume(
    costs: Sequence[float],
    accuracies: Sequence[float],
    *,
    reference_cost: float,
    reference_accuracy: float,
) -> float:
    """Return the area that the points dominate, up to a reference point; 0 without points.

    Raises:
        ValueError: If a value is not a number.
    """
    points = _minimised(costs, accuracies)
    if not len(points):
        return 0.0
    return float(moocore.hypervolume(points, ref=[reference_cost, -reference_accuracy]))


def _minimised(costs: Sequence[float], accuracies: Sequence[float]) -> NDArray[np.float64]:
    """Points [n, 2] in which lower is better in both columns."""
    points = np.column_stack([np.asarray(costs, float), -np.asarray(accuracies, float)])
    if np.isnan(points).any():
        row = int(np.flatnonzero(np.isnan(points).any(axis=1))[0])
        raise ValueError(f"point {row} is ({costs[row]}, {accuracies[row]}); give numbers")
    return points
