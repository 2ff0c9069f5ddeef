from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from search.records.front import Front, build_front
from search.records.trial_record import TrialRecord
from search.report.drawing import write_png
from search.report.pictures import (
    draw_front,
    draw_fronts,
    draw_growth,
    draw_methods,
    fronts_by_methods,
)
from tests.search.trial_records import DENSE, record


def sweep(members: int) -> tuple[Front, list[TrialRecord]]:
    records = [DENSE]
    for i in range(members):
        records += [
            record(f"{2 * i + 1:04d}", 0.1 + i / 50, 50.0 + i, spent=2 * i + 1),
            record(f"{2 * i + 2:04d}", 0.9, 40.0, methods="evit", spent=2 * i + 2),
        ]
    return build_front(records, "effective_gmacs"), records


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("members", [0, 1, 12])
def test_pictures_are_drawn_for_any_number_of_members(members: int, tmp_path: Path) -> None:
    front, records = sweep(members)
    assert len(front.members) == members
    figures = {
        "front": draw_front(front, records),
        "growth": draw_growth(front, records),
        "methods": draw_methods(front, records),
        "fronts": draw_fronts({"a": front, "b": front}),
    }
    for name, figure in figures.items():
        path = tmp_path / f"{name}.png"
        write_png(figure, path)
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 5  # not blank
        assert min(picture.shape) > 150


def test_the_front_is_a_stair_with_names_that_do_not_collide() -> None:
    front, records = sweep(12)
    (axes,) = draw_front(front, records).axes
    (line,) = axes.get_lines()
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xdata(), [0.1 + i / 50 for i in range(12)])
    np.testing.assert_allclose(line.get_ydata(), [50.0 + i for i in range(12)])
    named = [text.get_text() for text in axes.texts]
    assert named == ["0023", "0019", "0015", "0011", "0007", "0003"]  # every other one is too near


def test_growth_ends_with_the_fronts_hypervolume() -> None:
    front, records = sweep(12)
    (axes,) = draw_growth(front, records).axes
    assert axes.get_lines()[0].get_ydata()[-1] == pytest.approx(front.hypervolume)
    assert axes.texts[0].get_text() == f"{front.hypervolume:.4f} after 24 epochs"


def test_each_combination_of_methods_has_its_own_front() -> None:
    records = [
        DENSE,
        record("0001", 0.5, 70.0, methods="evit"),
        record("0002", 0.4, 60.0, methods="magnitude"),
        record("0003", 0.6, 65.0, methods="magnitude"),  # on that of its own methods alone
        record("0004", 0.3, 50.0, "stopped", methods="taylor"),
        record("0005", 0.3, 50.0, violates="params 9 beyond max_params = 8", methods="obd"),
    ]
    front = build_front(records, "effective_gmacs")
    found = dict(fronts_by_methods(front, records))
    assert list(found) == ["magnitude", "evit"]
    assert [m.trial for m in found["magnitude"].members] == ["0002", "0003"]
    assert found["evit"].hypervolume == pytest.approx(0.5 * 0.7)
    assert found["magnitude"].hypervolume == pytest.approx(0.2 * 0.6 + 0.4 * 0.65)
    figure = draw_methods(front, records)
    assert legend(figure) == ["0.3800  magnitude", "0.3500  evit", "on the overall front"]
    rings = figure.axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(rings, [[0.4, 60.0], [0.5, 70.0]])


def test_the_best_eight_combinations_are_drawn() -> None:
    records = [DENSE]
    records += [record(f"{i:04d}", 0.5, 50.0 + i % 7 + i, methods=f"m{i}") for i in range(1, 12)]
    front = build_front(records, "effective_gmacs")
    assert len(legend(draw_methods(front, records))) == 8 + 1
    volumes = [own.hypervolume for _, own in fronts_by_methods(front, records)]
    assert volumes == sorted(volumes, reverse=True)
    assert len(volumes) == 8


def test_fronts_are_told_apart() -> None:
    front, _ = sweep(2)
    figure = draw_fronts({"results/a": front, "results/b": front})
    volume = f"{front.hypervolume:.4f}"
    assert legend(figure) == [f"{volume}  results/a", f"{volume}  results/b", "dense"]
