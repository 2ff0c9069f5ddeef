"""The maths of successive halving with two objectives: rungs, brackets, and who may go on.

A rung holds the results of the trials that reached the same epoch: a cost (lower is better) and a
top-1 accuracy (higher is better) each. Who may go on is asked for one result at a time, when it
arrives, and never depends on the order in which the others came.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BAND = 4.0
"""Results that one is compared with, in multiples of eta.

That 4 of them are kept. Where the true share of better ones is 1/eta, the share among k results has
a standard error of sqrt((1 - 1/eta) / (eta k)), which for k = 4 eta is below 1 / (2 eta): half of
what is estimated, whatever eta is. Fewer results decide by chance, more come from costs where
trend and spread are others. A rung of 5 results is one band, so that the rule starts as
plain halving of what is left after the trend.
"""

TIE = 1e-9
"""Percent. The trend goes through two results, whose residuals are equal but for rounding."""

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def bracket_weights(rungs: int, eta: float, brackets: int) -> Floats:
    """Return the share of the trials [brackets] that each bracket gets.

    Bracket s leaves out the first s rungs. As in Hyperband (Li et al., 2018, arXiv:1603.06560,
    algorithm 1) a bracket that halves h times starts in proportion to eta^h / (h + 1), so that
    brackets cost about the same.

    Raises:
        ValueError: If there are more brackets than rungs and the one without any.
    """
    if not 1 <= brackets <= rungs + 1:
        raise ValueError(
            f"brackets is {brackets}, with {rungs} rungs; give 1 <= brackets <= {rungs + 1}"
        )
    halvings = rungs - np.arange(brackets, dtype=float)
    weights = eta ** (halvings - rungs) / (halvings + 1.0)
    return np.asarray(weights / weights.sum(), dtype=float)


def bracket_of(number: int, weights: Floats) -> int:
    """Return the bracket of the trial of this number.

    The multiples of the golden ratio, modulo 1, fill the unit interval evenly from the start, so
    that already few trials are spread in the proportions wanted. Nothing but the number counts, so
    that a resumed sweep needs no memory of it.
    """
    place = number * GOLDEN % 1.0
    return int(np.searchsorted(np.cumsum(weights[:-1]), place, side="right"))


def within_band(costs: Floats, top1s: Floats, candidate: int, eta: float) -> bool:
    """Say whether a result is among the best 1/eta of those of similar cost.

    Cost is known before training, so that almost every new cost is non-dominated and says nothing
    about how well a plan is chosen. Accuracy does, against the results nearest in log cost: at
    least `BAND` eta of them, or all. Their accuracies are compared less the local trend,
    since otherwise the cheapest of them would always lose to the dearer ones. Only the trend's
    slope is needed. Cheap models also differ more in accuracy than dear ones, so that residuals
    are ranked within the band and not over the whole rung.

    The first eta results may go on, and so may one that is cheaper than all others: nothing could
    stand in for it on the front. By chance alone that is true of the n-th result with
    probability 1/n, hence of few.
    """
    if len(costs) <= eta or (costs > costs[candidate]).sum() == len(costs) - 1:
        return True
    x = np.log(costs)
    distances = np.abs(x - x[candidate])
    wanted = min(len(x), math.ceil(BAND * eta))
    band = distances <= np.partition(distances, wanted - 1)[wanted - 1]  # ties belong to it
    residuals = top1s - trend(x[band], top1s[band]) * x
    better = int((residuals[band] > residuals[candidate] + TIE).sum())
    return bool((better + 1) * eta <= band.sum())


def trend(x: Floats, y: Floats) -> float:
    """Return the slope of y [k] in x [k]: the median over pairs, weighted by their distance in x.

    Sen's estimator (1968) in the weighted form of Jaeckel (1972): a few bad plans do not bend it,
    as they would a least-squares line through so few points. Accuracy does not fall with
    cost but by chance, hence never below 0.
    """
    left, right = np.triu_indices(len(x), k=1)
    runs, rises = x[right] - x[left], y[right] - y[left]
    apart = runs != 0.0
    if not apart.any():
        return 0.0
    slopes, weights = rises[apart] / runs[apart], np.abs(runs[apart])
    order = np.lexsort((weights, slopes))
    reached = np.cumsum(weights[order])
    middle = int(np.searchsorted(reached, reached[-1] / 2.0))
    return max(0.0, float(slopes[order][middle]))
