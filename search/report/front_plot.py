"""The interactive plot of a front: hovering over a point shows its plan."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go

from search.records.front import Front, cost_of_record, cost_ratio
from search.records.trial_record import TrialRecord
from search.report.drawing import DENSE, FRONT, INK, REST
from search.report.page import interactive, page
from search.report.pictures import AXIS, dominated, points
from search.report.progress import top1_text
from search.sweep.spec import alias_of

GREY = "rgba(128, 136, 146, {})"
"""Lines and areas behind the points, on dark and on light paper."""

_PAGE = """{% extends "frame" %}
{% block style %}
body { height: 100vh; display: flex; flex-direction: column; overflow: hidden; }
header { padding: 8px 12px 0; font-size: 13px; }
.plot { flex: 1; min-height: 0; }
.plot > div { height: 100%; }
@media print { .plot { display: block; height: 14cm; } }
{% endblock %}
{% block body %}
<header><b>hypervolume {{ "%.4f" | format(front.hypervolume) }}</b>, {{ front.members | length }}
on the front. Point at a model to read its plan.</header>
{{ plot }}
{% endblock %}
"""

_HOVER = (
    "<b>%{customdata[0]}</b><br>validation %{customdata[1]}<br>"
    "%{customdata[2]} GMACs, %{customdata[3]} effective<br>"
    "%{customdata[4]}<br>%{customdata[5]:,} params, density %{customdata[6]}<br>"
    "%{customdata[7]:,} images/s<br>%{customdata[8]}<extra></extra>"
)


def front_html(
    front: Front,
    records: Sequence[TrialRecord],
    budget: tuple[float, float] | None = None,
    aliases: Sequence[float] = (),
) -> str:
    """Return a page with the plot alone, for a frame of 600 x 525 pixels or more.

    Args:
        front: The front.
        records: All trials.
        budget: As of `front_figure`.
        aliases: As of `front_figure`.
    """
    plot = interactive(front_figure(front, records, budget, aliases), "100%")
    return page(_PAGE, title="front", front=front, plot=plot)


def front_figure(
    front: Front,
    records: Sequence[TrialRecord],
    budget: tuple[float, float] | None = None,
    aliases: Sequence[float] = (),
) -> go.Figure:
    """Plot top-1 against cost: the dense model, the front, and the dominated trials.

    Args:
        front: The front.
        records: All trials; those that were stopped or failed are not drawn.
        budget: Searched range of MACs, as shares of the dense model's; not drawn where the cost
            is time.
        aliases: Budgets of aliases in MLflow's registry, as shares of the dense cost.
    """
    rest = dominated(front, records)
    figure = go.Figure(
        [
            trace(front, rest, name="dominated", color=REST, size=6, opacity=0.6),
            trace(front, front.members, name="front", color=FRONT, size=9, steps=True),
            trace(front, [front.dense], name="dense", color=DENSE, size=14, symbol="star"),
        ]
    )
    whole = cost_of_record(front.dense, front.cost)
    if budget is not None and front.cost != "latency":
        _mark_range(figure, budget[0] * whole, budget[1] * whole)
    for share in aliases:
        _mark_budget(figure, share * whole, alias_of(share))
    lay_out(figure, AXIS[front.cost])
    return figure


def trace(
    front: Front,
    records: Sequence[TrialRecord],
    *,
    name: str,
    color: str,
    size: int,
    symbol: str = "circle",
    opacity: float = 1.0,
    steps: bool = False,
    unit: float = 1.0,
) -> go.Scatter:
    """Return models of a sweep as points with their plans.

    Args:
        front: The sweep's front.
        records: The models.
        name: In the legend.
        color: Of the points.
        size: Of the points, in pixels.
        symbol: Plotly's name of their shape.
        opacity: Of the points.
        steps: Whether a step function joins them.
        unit: Divisor of the costs.
    """
    costs, tops = points(front, records)
    return go.Scatter(
        x=[float(f"{cost / unit:.5g}") for cost in costs],
        y=[round(top, 3) for top in tops],
        customdata=[_hover_values(front, record) for record in records],
        hovertemplate=_HOVER,
        name=html.escape(name),
        mode="lines+markers" if steps else "markers",
        line={"shape": "hv" if steps else "linear", "width": 2},
        marker={"size": size, "color": color, "symbol": symbol, "opacity": opacity},
    )


def lay_out(figure: go.Figure, cost: str) -> None:
    """Give a plot of top-1 against cost its axes, and a legend above them."""
    figure.update_layout(
        template="none",
        margin={"l": 52, "r": 14, "t": 34, "b": 46},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 11}},
        hoverlabel={
            "align": "left",
            "font": {"size": 11, "color": "white"},
            "bgcolor": INK,
            "bordercolor": REST,
        },
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        autosize=True,
    )
    figure.update_xaxes(title={"text": cost, "font": {"size": 12}, "standoff": 8})
    figure.update_yaxes(title={"text": "validation top-1 (%)", "font": {"size": 12}})
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(gridcolor=GREY.format(0.25), linecolor=GREY.format(0.6), zeroline=False)


def _hover_values(front: Front, record: TrialRecord) -> list[str | float]:
    """Return the values of a model that `_HOVER` shows."""
    test = f", test {record.test_top1:.1f} %" if record.test_top1 is not None else ""
    ms = f", {record.latency_ms:.3g} ms" if record.latency_ms is not None else ""
    return [
        html.escape(record.name),
        f"{top1_text(record)} %{test}",
        f"{record.gmacs:.4g}",
        f"{record.effective_gmacs:.4g}",
        f"{cost_ratio(front, record):.2f}x of the dense cost{ms}",
        record.params or 0,
        f"{record.density:.2f}",
        round(record.images_per_s or 0),
        "<br>".join(html.escape(line) for line in textwrap.wrap(record.plan_line, 42)),
    ]


def _mark_range(figure: go.Figure, low: float, high: float) -> None:
    figure.add_vrect(
        x0=low,
        x1=high,
        fillcolor=GREY.format(0.1),
        line_width=0,
        layer="below",
        name="searched budgets",
        showlegend=True,
    )


def _mark_budget(figure: go.Figure, cost: float, name: str) -> None:
    figure.add_vline(
        x=cost,
        line={"dash": "dot", "width": 1, "color": GREY.format(0.9)},
        layer="below",
        label={
            "text": name,
            "textposition": "start",
            "xanchor": "left",
            "yanchor": "top",
            "font": {"size": 10},
        },
    )
