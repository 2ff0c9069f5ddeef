from __future__ import annotations

import plotly.graph_objects as go
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from search.report.drawing import blank
from search.report.page import interactive, page, still

TEMPLATE = '{% extends "frame" %}{% block body %}<p>{{ word }}</p>{% endblock %}'


def test_what_is_put_into_a_page_is_escaped() -> None:
    text = page(TEMPLATE, title="<a> & b", word="</p><script>alert(1)</script>")
    assert "<title>&lt;a&gt; &amp; b</title>" in text
    assert "<p>&lt;/p&gt;&lt;script&gt;alert(1)&lt;/script&gt;</p>" in text
    assert "<p><b>1</b></p>" in page(TEMPLATE, title="a", word=Markup("<b>1</b>"))


def test_what_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="word"):
        page(TEMPLATE, title="a")


def test_a_page_follows_dark_light_and_paper() -> None:
    text = page(TEMPLATE, title="a", word="b")
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert "http" not in text


def test_a_still_picture_is_in_the_page() -> None:
    figure = blank(2, 2)
    figure.text(0.5, 0.5, "<i>")
    text = page(TEMPLATE, title="a", word=still(figure))
    assert "<p><figure><svg" in text
    assert "&lt;i&gt;" in text


def test_an_interactive_plot_loads_nothing_and_uploads_nothing() -> None:
    text = str(interactive(go.Figure(go.Scatter(x=[1], y=[2], name="</script><b>")), "300px"))
    assert "plotly.js v" in text
    assert 'src="http' not in text
    assert '"modeBarButtons": [["zoom2d", "pan2d", "resetScale2d"]]' in text  # no "Share chart"
    assert "</script><b>" not in text
