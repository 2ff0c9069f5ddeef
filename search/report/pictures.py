"""Still pictures of a front as curves: the front itself, its growth, and that of each method."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.records.front import Front, build_front, cost_of_record, cost_ratio
from search.records.growing_front import growth
from search.records.trial_record import TrialRecord
from search.report.drawing import DENSE, FRONT, INK, PALE, REST, SERIES, blank, plain

AXIS = {
    "effective_gmacs": "effective GMACs (MACs on weights that are not zero)",
    "gmacs": "GMACs",
    "latency": "milliseconds per image",
}
SHARE = {
    "effective_gmacs": "effective MACs, share of the dense model's",
    "gmacs": "MACs, share of the dense model's",
    "latency": "time per image, share of the dense model's",
}
"""Labels of cost axes: absolute, and as shares of the dense model's."""


def draw_front(front: Front, records: Sequence[TrialRecord]) -> Figure:
    """Draw top-1 against cost."""
    figure = blank(8, 5)
    axes = figure.add_subplot()
    rest = dominated(front, records)
    axes.scatter(*points(front, rest), s=22, color=REST, alpha=0.6, lw=0, label="dominated")
    axes.plot(
        *points(front, front.members),
        "o-",
        drawstyle="steps-post",
        color=FRONT,
        label="front",
        zorder=3,
    )
    axes.scatter(
        *points(front, [front.dense]), marker="*", s=150, color=DENSE, label="dense", zorder=3
    )
    for member in _apart(front):
        axes.annotate(
            member.trial,
            (cost_of_record(member, front.cost), member.val_top1),
            textcoords="offset points",
            xytext=(-3, 4),
            ha="right",
            fontsize=8,
            color=FRONT,
        )
    axes.set(xlabel=AXIS[front.cost], ylabel="validation top-1 (%)")
    axes.set_title(f"hypervolume {front.hypervolume:.4f}", loc="left", fontsize=10, color=INK)
    _finish(figure, axes)
    return figure


def draw_growth(front: Front, records: Sequence[TrialRecord]) -> Figure:
    """Draw the hypervolume against the epochs of fine-tuning that the sweep had spent."""
    figure = blank(8, 4)
    axes = figure.add_subplot()
    steps = [(spent, volume) for spent, volume in growth(records, front.cost) if volume > 0.0]
    if steps:
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=FRONT)
        spent, volume = steps[-1]
        axes.plot([spent], [volume], "o", color=FRONT)
        axes.annotate(
            f"{volume:.4f} after {spent} epochs",
            (spent, volume),
            textcoords="offset points",
            xytext=(0, 6),
            ha="right",
            fontsize=9,
            color=FRONT,
        )
    axes.margins(x=0.03, y=0.12)
    axes.set(xlabel="epochs of fine-tuning, all trials together", ylabel="hypervolume")
    _finish(figure, axes)
    return figure


def draw_methods(front: Front, records: Sequence[TrialRecord]) -> Figure:
    """Draw the front that each combination of methods reached by itself, the best eight.

    Members of the overall front are ringed.
    """
    figure = blank(8, 5.4)
    axes = figure.add_subplot()
    for color, (methods, own) in zip(SERIES, fronts_by_methods(front, records), strict=False):
        _draw_steps(axes, methods, own, color)
    costs, tops = shares(front)
    rings = axes.scatter(costs, tops, s=80, facecolors="none", edgecolors=INK, zorder=3)
    rings.set_label("on the overall front")
    axes.set(xlabel=SHARE[front.cost], ylabel="validation top-1 (%)")
    _finish(figure, axes, "hypervolume, methods")
    return figure


def draw_fronts(fronts: Mapping[str, Front]) -> Figure:
    """Draw fronts that are compared, by name; all count the same cost."""
    figure = blank(8, 5.4)
    axes = figure.add_subplot()
    for color, (name, front) in zip(itertools.cycle(SERIES), fronts.items(), strict=False):
        _draw_steps(axes, name, front, color)
    axes.plot([1.0], points(front, [front.dense])[1], "*", ms=14, color=INK, label="dense")
    axes.set(xlabel=SHARE[front.cost], ylabel="validation top-1 (%)")
    _finish(figure, axes, "hypervolume, sweep")
    return figure


def fronts_by_methods(
    front: Front, records: Sequence[TrialRecord], most: int = len(SERIES)
) -> list[tuple[str, Front]]:
    """Return the front of each combination of methods, largest hypervolume first.

    Args:
        front: The overall front.
        records: All trials of the sweep.
        most: Number of combinations.
    """
    finished: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.status == "finished":
            finished.setdefault(record.methods, []).append(record)
    fronts = [
        (methods, build_front([front.dense, *own], front.cost, front.classes))
        for methods, own in finished.items()
    ]
    fronts = [(methods, own) for methods, own in fronts if own.members]
    return sorted(fronts, key=lambda pair: -pair[1].hypervolume)[:most]


def dominated(front: Front, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the finished trials that are not on the front."""
    members = {member.trial for member in front.members}
    return [r for r in records if r.status == "finished" and r.trial not in members]


def points(front: Front, records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    """Return costs and top-1."""
    return [cost_of_record(r, front.cost) for r in records], [r.val_top1 or 0.0 for r in records]


def shares(front: Front) -> tuple[list[float], list[float]]:
    """Return the members' costs as shares of the dense model's, and their top-1."""
    members = front.members
    return [cost_ratio(front, member) for member in members], points(front, members)[1]


def _draw_steps(axes: Axes, name: str, front: Front, color: str) -> None:
    """Draw a front as a step function of cost, up to the dense model's."""
    costs, tops = shares(front)
    label = f"{front.hypervolume:.4f}  {name}"
    line = ([*costs, max(1.0, costs[-1])], [*tops, tops[-1]]) if costs else ([], [])
    axes.plot(*line, drawstyle="steps-post", color=color, label=label)
    axes.plot(costs, tops, "o", ms=4, color=color)


def _apart(front: Front, gap: float = 0.035) -> list[TrialRecord]:
    """Return members whose labels do not overlap, the dearest among them."""
    chosen: list[TrialRecord] = []
    for member in reversed(front.members):
        if not chosen or cost_ratio(front, chosen[-1]) - cost_ratio(front, member) > gap:
            chosen.append(member)
    return chosen


def _finish(figure: Figure, axes: Axes, title: str = "") -> None:
    """Add a grid, and a legend below the axes."""
    axes.grid(color=PALE, alpha=0.5)
    plain(axes)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        columns = 3 if len(handles) < 4 else 2
        figure.legend(
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            title=title,
            title_fontproperties={"size": 9},
        ).get_title().set_color(INK)
