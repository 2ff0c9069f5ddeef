"""The frame of a page: one file, readable on dark and on light paper, and printed.

Values are escaped, unless marked as HTML.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from search.report.drawing import svg

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #1f2933; --pale: #c3cad1; --soft: #f3f5f7; --front: #c23b50; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #dfe4e9; --pale: #46505a; --soft: #1f252c; --front: #e8697e; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5em; margin: 0 0 .2em; }
h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p { margin: .3em 0 .8em; max-width: 75ch; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 20px 60px; }
table { border-collapse: collapse; font-size: .87em; }
th, td { padding: 3px 9px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--pale); }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.front { color: var(--front); font-weight: 600; }
pre { background: var(--soft); padding: 12px; overflow-x: auto; font-size: .85em; }
summary { cursor: pointer; }
figure { margin: 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
.js-plotly-plot .main-svg text:not(.hoverlayer text) { fill: var(--ink) !important; }
.js-plotly-plot .modebar { opacity: .75; }
.js-plotly-plot .modebar-group { background: none !important; }
.js-plotly-plot .modebar-btn path { fill: var(--ink) !important; }
.printed { display: none; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .plot { display: none; }
  .printed { display: block; }
  .scroll, figure, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  table { font-size: 7.5pt; width: 100%; }
  td, th { padding: 2px 4px; }
  td { overflow-wrap: anywhere; }
  thead { display: table-header-group; }
  tr, section { break-inside: avoid; }
  td:first-child { white-space: nowrap; }
  figure svg { max-height: 24cm; }
  h2 { break-after: avoid; }
}
{% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [
        ["zoom2d", "pan2d", "resetScale2d"]
    ],  # without the one that uploads the plot
}


def page(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: A Jinja template that extends "frame" and fills its blocks `body` and `style`.
        values: The template's variables, `title` among them.
    """
    environment = Environment(
        autoescape=True,
        loader=DictLoader({"frame": FRAME}),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(template).render(**values)


def still(figure: Figure) -> Markup:
    """Return a still picture as HTML."""
    return Markup(f"<figure>{svg(figure)}</figure>")


def interactive(figure: go.Figure, height: str) -> Markup:
    """Return an interactive plot as HTML, with the program that draws it: one to a page.

    Args:
        figure: The plot.
        height: Of the plot, in CSS.
    """
    html = figure.to_html(
        full_html=False, include_plotlyjs=True, config=_CONFIG, default_height=height
    )
    return Markup(f'<div class="plot">{html}</div>')
