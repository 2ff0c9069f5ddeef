"""`python -m search compare`: fronts of several sweeps of one model, against the first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TextIO

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pruners.model.files import replace_file
from search.records.files import read_front
from search.records.front import Front, cost_of_record
from search.records.front_diff import change
from search.report.drawing import REST, SERIES
from search.report.front_plot import lay_out, trace
from search.report.page import interactive, page, still
from search.report.pictures import SHARE, draw_fronts

COLUMNS = ("sweep", "hypervolume", "change", "members", "points won", "points lost")
"""Columns of the table; points are won and lost against the first sweep."""

SAME_TOP1 = 0.5
"""Points by which the same dense model may differ in top-1, measured on another device."""

_PAGE = """{% extends "frame" %}
{% block body %}
<main>
<h1>Fronts compared</h1>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>Against the first sweep: points won are members that it has nothing as good as, points lost its
own members that the other has nothing as good as.</p>
{{ plot }}
<div class="printed">{{ picture }}</div>
</main>
{% endblock %}
"""


def read_fronts(directories: list[Path]) -> dict[str, Front]:
    """Read the fronts of sweeps that can be compared, by directory.

    Raises:
        FileNotFoundError: If a directory has no front.
        ValueError: If a front is damaged, or the sweeps count different costs, or are not of the
            same dense model.
    """
    if len(set(directories)) < 2:
        raise ValueError(f"{len(set(directories))} sweep to compare; give two directories or more")
    fronts = {str(path): read_front(path / "front.json") for path in directories}
    (first, model), *others = fronts.items()
    for name, front in others:
        _refuse_another(first, model, name, front)
    return fronts


def print_comparison(fronts: Mapping[str, Front], stream: TextIO) -> None:
    """Print the table."""
    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows(fronts):
        table.add_row(*map(Text, row))
    console.print(table)


def write_comparison(fronts: Mapping[str, Front], out: Path) -> None:
    """Write the table and the fronts in one plot as a self-contained page."""
    text = page(
        _PAGE,
        title="fronts compared",
        columns=COLUMNS,
        rows=rows(fronts),
        plot=interactive(fronts_figure(fronts), "560px"),
        picture=still(draw_fronts(fronts)),
    )
    replace_file(out, partial(Path.write_text, data=text, encoding="utf-8"))


def rows(fronts: Mapping[str, Front]) -> list[tuple[str, ...]]:
    """Return the table's cells, a row for each sweep."""
    first = next(iter(fronts.values()))
    found: list[tuple[str, ...]] = []
    for name, front in fronts.items():
        against = change(first, front)
        cells = [name, f"{against.after:.4f}", "", str(len(front.members)), "", ""]
        if front is not first:
            if against.before:
                cells[2] = f"{100 * (against.after / against.before - 1):+.1f} %"
            cells[4:] = [_named(against.gained), _named(against.lost)]
        found.append(tuple(cells))
    return found


def fronts_figure(fronts: Mapping[str, Front]) -> go.Figure:
    """Plot all fronts against the share of the dense model's cost."""
    figure = go.Figure()
    for color, (name, front) in zip(itertools.cycle(SERIES), fronts.items(), strict=False):
        whole = cost_of_record(front.dense, front.cost)
        members = trace(
            front, front.members, name=name, color=color, size=8, steps=True, unit=whole
        )
        figure.add_trace(members)
    star = trace(front, [front.dense], name="dense", color=REST, size=14, symbol="star", unit=whole)
    figure.add_trace(star)
    lay_out(figure, SHARE[front.cost])
    return figure


def _named(trials: tuple[str, ...]) -> str:
    return f"{len(trials)}: {', '.join(trials)}" if trials else "0"


def _refuse_another(first: str, model: Front, name: str, front: Front) -> None:
    """Refuse a front whose hypervolume cannot be compared.

    Raises:
        ValueError: If it counts another cost, or its dense model is another.
    """
    if front.cost != model.cost:
        raise ValueError(
            f"cost is {model.cost} in {first} and {front.cost} in {name}; "
            "give sweeps that count the same"
        )
    for key, tolerance in (("params", 0.0), ("gmacs", 1e-9), ("val_top1", SAME_TOP1)):
        one, other = (float(getattr(f.dense, key)) for f in (model, front))
        if not math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance):
            raise ValueError(
                f"{key} of the dense model is {one:.10g} in {first} and {other:.10g} in {name}; "
                "give sweeps of one model, on the same images"
            )
