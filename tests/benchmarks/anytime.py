"""Hypervolume over training epochs, and what follows from it; pure, from lists of trials.

An arm is judged as in JAHS-Bench-201 (Bansal et al., 2022): by the hypervolume that it has reached
when so many epochs are spent, as mean and standard error over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.records import pareto

Curve = NDArray[np.float64]
"""[epochs + 1] or [seeds, epochs + 1]: a value for each number of epochs spent, 0 first."""

REFERENCE_COST = 1.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that has ended.

    Attributes:
        number: Its place in the order of its arm.
        what: What was tried.
        cost: MACs as a share of the dense model's.
        epochs: Training epochs it took; 0 if it was only looked at.
        top1: Validation top-1 in percent after the full length; None without it.
        untuned: The same before training; None if it was not measured.
        before_s: Seconds of everything before training: scoring, cutting, measuring.
        train_s: Seconds of training and measuring afterwards.
    """

    number: int
    what: str
    cost: float
    epochs: int
    top1: float | None
    untuned: float | None = None
    before_s: float = 0.0
    train_s: float = 0.0


def within(trials: Sequence[Ended], epochs: int) -> list[Ended]:
    """Return the first trials that took no more than so many epochs together."""
    spent = np.cumsum([trial.epochs for trial in trials])
    return [trial for trial, total in zip(trials, spent, strict=True) if total <= epochs]


def volume(trials: Sequence[Ended], reference_top1: float) -> float:
    """Return the area that tuned trials dominate in (cost, top-1 / 100).

    Args:
        trials: Trials.
        reference_top1: Percent; what is not better counts for nothing.
    """
    tuned = [trial for trial in trials if trial.top1 is not None]
    return pareto.hypervolume(
        [trial.cost for trial in tuned],
        [(trial.top1 or 0.0) / 100.0 for trial in tuned],
        reference_cost=REFERENCE_COST,
        reference_accuracy=reference_top1 / 100.0,
    )


def curve(trials: Sequence[Ended], epochs: int, reference_top1: float) -> Curve:
    """Return the hypervolume for each number of epochs spent, [epochs + 1]."""
    return np.array([volume(within(trials, e), reference_top1) for e in range(epochs + 1)])


def mean(values: Curve) -> Curve:
    """Mean over seeds, the first axis."""
    return np.asarray(values.mean(axis=0))


def standard_error(values: Curve) -> Curve:
    """Standard error of the mean over seeds, the first axis; NaN with one seed."""
    return deviation(values) / math.sqrt(len(values))


def deviation(values: Curve) -> Curve:
    """Standard deviation over seeds, the first axis; NaN with one seed."""
    if len(values) < 2:
        return np.full(values.shape[1:], math.nan)
    return np.asarray(values.std(axis=0, ddof=1))


def epochs_to_reach(values: Curve, level: float) -> int | None:
    """Return the first number of epochs at which a curve [epochs + 1] is at a level, or None."""
    reached = np.flatnonzero(values >= level)
    return int(reached[0]) if len(reached) else None


def best_below(trials: Sequence[Ended], cost: float) -> float:
    """Return the best top-1 of what costs no more; NaN if nothing does."""
    found = [t.top1 for t in trials if t.top1 is not None and t.cost <= cost]
    return max(found, default=math.nan)


def front(trials: Sequence[Ended]) -> list[Ended]:
    """Return what no other trial beats, cheapest first."""
    tuned = [trial for trial in trials if trial.top1 is not None]
    best = pareto.front([t.cost for t in tuned], [t.top1 or 0.0 for t in tuned])
    members = [trial for trial, keeps in zip(tuned, best, strict=True) if keeps]
    return sorted(members, key=lambda trial: trial.cost)


def coarse_to_fine(count: int) -> list[int]:
    """Return 0..count-1 in an order whose every beginning is spread evenly: bits reversed."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{width}b}"[::-1])


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Whether the engine reaches the best rival's last value early, and ends above it.

    Attributes:
        rival: Name of the rival with the highest mean at the end.
        level: That mean.
        reached: Epochs at which the engine's mean is as high; None if it never is.
        epochs: Epochs of every arm.
        margin: Engine's mean at the end, less the rival's.
        spread: Root of the summed squares of both standard deviations over seeds; NaN with one.
    """

    rival: str
    level: float
    reached: int | None
    epochs: int
    margin: float
    spread: float

    @property
    def early(self) -> bool:
        return self.reached is not None and 3 * self.reached <= self.epochs

    @property
    def above(self) -> bool:
        """False with one seed, of which nothing is known of the spread."""
        return self.margin > self.spread


def goal(engine: Curve, rivals: dict[str, Curve]) -> Goal:
    """Compare curves [seeds, epochs + 1]."""
    rival = max(rivals, key=lambda name: float(mean(rivals[name])[-1]))
    level = float(mean(rivals[rival])[-1])
    return Goal(
        rival=rival,
        level=level,
        reached=epochs_to_reach(mean(engine), level),
        epochs=engine.shape[1] - 1,
        margin=float(mean(engine)[-1]) - level,
        spread=math.hypot(float(deviation(engine)[-1]), float(deviation(rivals[rival])[-1])),
    )
