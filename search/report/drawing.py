"""Writes still pictures: as PNG, or as SVG whose lines and words take a page's colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.spines import Spine

from pruners.model.files import replace_file
from search.records.trial_record import TrialRecord

FRONT, REST, DENSE = "#d1495b", "#9aa5b1", "#2f80c3"
"""Colours of front, dominated trials and dense model, on light and on dark paper."""

SERIES = (
    "#d1495b",
    "#2f80c3",
    "#3a9d5d",
    "#c9820a",
    "#8e63b5",
    "#16a3a8",
    "#b5651d",
    "#7a8794",
)
"""Colours that can be told apart, on light and on dark paper."""

INK, PALE = "#1f2933", "#c3cad1"
"""Colours of words and of frames; in a page, its variables `--ink` and `--pale`."""

_PAGE = {INK: "var(--ink)", PALE: "var(--pale)"}


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def plain(axes: Axes) -> None:
    """Give axes the colours of words and frames, and no paper of their own."""
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=INK, labelcolor=INK)
    for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    for spine in axes.findobj(Spine):
        spine.set_edgecolor(PALE)


def cell_text(
    figure: Figure,
    axes: Axes,
    column: float,
    row: float,
    text: str,
    color: str,
    ha: Literal["left", "center", "right"] = "center",
) -> None:
    """Write into a cell of a table, or beside it; half as expensive as `Axes.text`, which clips."""
    figure.text(
        column,
        row,
        text,
        transform=axes.transData,
        ha=ha,
        va="center",
        fontsize=7,
        color=color,
    )


def write_png(figure: Figure, path: Path) -> None:
    """Write a PNG file on white paper, under a temporary name first."""
    FigureCanvasAgg(figure)
    replace_file(path, partial(figure.savefig, format="png", facecolor="white"))


def svg(figure: Figure) -> str:
    """Return an SVG element without paper, whose words and frames have a page's colours.

    The page defines them as `--ink` and `--pale`.
    """
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prunefront"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in _PAGE.items():
        text = text.replace(color, variable)
    return text


def spread(members: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """Return at most so many members of a front, evenly spread, both ends among them."""
    if len(members) <= most:
        return list(members)
    last = len(members) - 1
    return [members[round(i * last / (most - 1))] for i in range(most)]
