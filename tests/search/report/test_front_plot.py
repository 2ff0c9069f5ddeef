from __future__ import annotations

import pytest
from plotly.offline import get_plotlyjs

from search.records.front import build_front
from search.report.front_plot import front_figure, front_html
from tests.search.trial_records import DENSE, record

RECORDS = [
    DENSE,
    record("0001", 0.5, 70.0, test_top1=69.25, latency_ms=2.5),
    record("0002", 0.6, 60.0, plan_line="evit: tokens -11 %", name="0002 <b>evit & co"),
    record("0003", 0.2, None, "failed"),
    record("0004", 0.3, 20.0, "stopped"),
    record("0005", 0.7, 75.0, spread=0.5, within_spread=True),
]
FRONT = build_front(RECORDS, "effective_gmacs")


def test_the_front_what_it_dominates_and_the_dense_model_are_drawn() -> None:
    figure = front_figure(FRONT, RECORDS)
    drawn = {t.name: list(zip(t.x, t.y, strict=True)) for t in figure.data}
    assert drawn == {
        "dominated": [(0.6, 60.0)],
        "front": [(0.5, 70.0), (0.7, 75.0)],
        "dense": [(1.0, 80.0)],
    }
    assert figure.data[1].line.shape == "hv"  # what is reached at most at a cost
    assert not figure.layout.shapes


def test_whoever_hovers_reads_the_plan() -> None:
    figure = front_figure(FRONT, RECORDS)
    first = figure.data[1].customdata[0]
    assert list(first) == [
        "0001 grouped 0.50x",
        "70.0 %, test 69.2 %",
        "1",
        "0.5",
        "0.50x of the dense cost, 2.5 ms",
        1000,
        "0.50",
        12,
        "grouped: neurons -50 %",
    ]
    template = figure.data[1].hovertemplate
    assert all(f"%{{customdata[{i}]" in template for i in range(len(first)))
    assert figure.data[0].customdata[0][0] == "0002 &lt;b&gt;evit &amp; co"


def test_a_long_plan_is_wrapped() -> None:
    plan = "; ".join(f"magnitude-{i}: weights -{i} % (6 to 73)" for i in range(9))
    records = [DENSE, record("0001", 0.5, 70.0, plan_line=plan)]
    figure = front_figure(build_front(records, "gmacs"), records)
    lines = figure.data[1].customdata[0][-1].split("<br>")
    assert max(map(len, lines)) <= 42
    assert " ".join(lines) == plan


def test_budgets_are_marked() -> None:
    dense = record("0000", 2.0, 80.0, "dense", origin="dense")
    records = [dense, *RECORDS[1:]]
    front = build_front(records, "effective_gmacs")
    figure = front_figure(front, records, budget=(0.3, 0.8), aliases=(0.5, 0.25))
    band, half, quarter = figure.layout.shapes
    assert (band.x0, band.x1, band.layer) == (pytest.approx(0.6), pytest.approx(1.6), "below")
    assert (half.x0, half.x1, half.label.text) == (1.0, 1.0, "best-under-50")
    assert (quarter.x0, quarter.label.text) == (0.5, "best-under-25")
    assert {half.line.dash, quarter.line.dash} == {"dot"}


def test_a_range_of_macs_is_not_drawn_over_time() -> None:
    records = [
        record("0000", 1.0, 80.0, "dense", origin="dense", latency_ms=4.0),
        record("0001", 0.5, 70.0, latency_ms=3.0),
    ]
    front = build_front(records, "latency")
    figure = front_figure(front, records, budget=(0.3, 0.8), aliases=(0.5,))
    (alias,) = figure.layout.shapes
    assert alias.x0 == 2.0
    assert figure.layout.xaxis.title.text == "milliseconds per image"


def test_the_page_is_self_contained_and_says_the_plans() -> None:
    page = front_html(FRONT, RECORDS, (0.3, 0.8), (0.5,))
    assert "<script src" not in page
    assert "plotly.js v" in page
    for words in (
        "grouped: neurons -50 %",
        "evit: tokens -11 %",
        f"hypervolume {FRONT.hypervolume:.4f}",
        "2\non the front",
        "effective GMACs",
        "best-under-50",
    ):
        assert words in page
    assert "0003 grouped" not in page
    assert "<b>evit" not in page


def test_a_thousand_trials_add_little() -> None:
    plan = "grouped: heads -15 % (0 to 62), neurons -57 % (2 to 86); tome: tokens -21 % (12 to 37)"
    many = [record(f"{i:04d}", i / 1001, i / 20, plan_line=plan) for i in range(1, 1000)]
    records = [DENSE, *many]
    page = front_html(build_front(records, "effective_gmacs"), records)
    assert len(page) - len(get_plotlyjs()) < 300_000
