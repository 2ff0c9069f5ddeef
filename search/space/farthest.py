"""Farthest-first traversal: an order whose every prefix is spread as evenly as can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def farthest_first(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return an order of points [n, d]: the first, then always the one farthest from those before.

    Of equally far ones, the first of the points (Gonzalez, 1985).
    """
    order = np.zeros(len(points), dtype=np.int64)
    distances = np.full(len(points), np.inf)
    for place in range(1, len(points)):
        last = points[order[place - 1]]
        distances = np.minimum(distances, ((points - last) ** 2).sum(axis=1))
        distances[order[place - 1]] = -1.0  # taken
        order[place] = int(distances.argmax())
    return order
