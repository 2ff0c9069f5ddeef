from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from search.report.drawing import INK, PALE, blank, plain, spread, svg, write_png
from tests.search.trial_records import record


@pytest.fixture
def figure() -> Figure:
    figure = blank(3, 2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [1, 0], color="#d1495b")
    axes.set_title("a <b> & c")
    plain(axes)
    return figure


def test_a_png_is_whole_and_on_white_paper(figure: Figure, tmp_path: Path) -> None:
    write_png(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.size == (330, 220)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert np.asarray(picture).std() > 5


def test_an_svg_takes_the_pages_colours(figure: Figure) -> None:
    text = svg(figure)
    assert text.startswith("<svg")
    assert INK not in text
    assert PALE not in text
    assert "var(--ink)" in text
    assert "var(--pale)" in text
    assert "#d1495b" in text
    assert "a &lt;b&gt; &amp; c" in text
    ET.fromstring(text)
    assert "#ffffff" not in text  # no paper of its own


def test_a_figure_can_be_both(figure: Figure, tmp_path: Path) -> None:
    svg(figure)
    write_png(figure, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (330, 220)
    assert "var(--ink)" in svg(figure)


@pytest.mark.parametrize(("count", "most"), [(0, 3), (3, 3), (4, 3), (40, 15), (16, 15)])
def test_spread_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    members = [record(f"{i:04d}", 0.5, 50.0) for i in range(count)]
    shown = [member.trial for member in spread(members, most)]
    assert len(shown) == min(count, most)
    assert shown == sorted(set(shown))
    assert not count or (shown[0], shown[-1]) == ("0000", f"{count - 1:04d}")
