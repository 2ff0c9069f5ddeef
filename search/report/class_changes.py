"""Accuracy of each class before and after pruning: the classes that pay for the saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from search.records.front import Front, cost_ratio
from search.records.trial_record import TrialRecord
from search.report.drawing import INK, blank, cell_text, plain, spread

MOST_CLASSES, MOST_MEMBERS = 30, 15
"""Classes and members that a picture shows."""

_LONGEST = 24  # letters of a class's name


@dataclass(frozen=True, kw_only=True)
class ClassChanges:
    """Top-1 of each class on validation images, before and after.

    Attributes:
        names: Names of the classes that have images, those that lose most first.
        before: Percent of the dense model, [classes].
        trials: The front's members of which it is known, cheapest first.
        change: Points that each of them gains, [members, classes].
    """

    names: tuple[str, ...]
    before: NDArray[np.float64]
    trials: tuple[TrialRecord, ...]
    change: NDArray[np.float64]


def class_changes(front: Front) -> ClassChanges | None:
    """Return the change of each class's top-1 on a front; None if it is not known."""
    members = tuple(m for m in front.members if m.by_class)
    if not members or not front.dense.by_class:
        return None
    before = np.array(front.dense.by_class, dtype=float)  # None becomes NaN
    change = np.array([m.by_class for m in members], dtype=float) - before
    known = np.flatnonzero(~np.isnan(change).any(axis=0))
    order = known[np.argsort(change[:, known].mean(axis=0), kind="stable")]
    names = class_names(front.classes, len(before))
    return ClassChanges(
        names=tuple(names[i] for i in order),
        before=before[order],
        trials=members,
        change=change[:, order],
    )


def class_names(classes: Sequence[str], count: int) -> list[str]:
    """Return the names of classes, or numbers if they have none."""
    return list(classes) if len(classes) == count else [str(i) for i in range(count)]


def draw_classes(front: Front, changes: ClassChanges) -> Figure:
    """Draw the points of top-1 that each member gains and loses in each class.

    Of many classes those are shown that lose most and those that gain most.
    """
    count, half = len(changes.names), MOST_CLASSES // 2
    rows = np.arange(count)
    if count > MOST_CLASSES:
        rows = np.concatenate([rows[:half], rows[-half:]])
    trials = spread(changes.trials, MOST_MEMBERS)
    chosen = [changes.trials.index(trial) for trial in trials]
    change = changes.change[chosen][:, rows].T
    most = max(1.0, float(np.abs(change).max()))
    figure = blank(3.2 + 0.52 * max(5, len(trials)), 1.3 + 0.23 * max(5, len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(change, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for (row, column), points in np.ndenumerate(change):
        text = f"{points:+.0f}" if abs(points) >= 0.5 else "0"
        cell_text(
            figure, axes, column, row, text, "white" if abs(points) > 0.65 * most else "black"
        )
    if count > MOST_CLASSES:
        axes.axhline(half - 0.5, color="black", lw=1.5)
    labels = [f"{label(changes.names[i])}  {changes.before[i]:.0f} %" for i in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    columns = [f"{t.trial}\n{cost_ratio(front, t):.2f}x" for t in trials]
    axes.set_xticks(range(len(trials)), columns, fontsize=7)
    axes.set_ylabel("class, and top-1 of the dense model", fontsize=8)
    plain(axes)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("points of top-1 gained", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    axes.set_title(_title(count, len(trials), len(front.members)), fontsize=9, color=INK)
    return figure


def label(name: str) -> str:
    """Return a class's name for a picture: shortened, with `$` escaped."""
    short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    return short.replace("$", r"\$")


def _title(classes: int, shown: int, members: int) -> str:
    half = MOST_CLASSES // 2
    what = f"{half} of {classes} classes that lose most, {half} that gain most"
    title = what if classes > MOST_CLASSES else "change of top-1, class by class"
    return title + (f"; {shown} of {members} members" if shown < members else "")
