from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.records.front import Front, build_front
from search.report.class_changes import class_changes, draw_classes, label
from search.report.drawing import write_png
from tests.search.trial_records import DENSE, record


def front_of(
    before: list[float | None], *after: list[float | None], classes: tuple[str, ...] = ()
) -> Front:
    dense = dataclasses.replace(DENSE, by_class=before)
    members = [
        record(f"{i:04d}", 0.1 + i / 100, 50.0 + i / 10, by_class=by_class)
        for i, by_class in enumerate(after, 1)
    ]
    return build_front([dense, *members], "effective_gmacs", classes)


def test_those_that_lose_most_come_first() -> None:
    front = front_of(
        [90.0, None, 80.0, 50.0, 70.0],
        [80.0, None, 81.0, 20.0, 70.0],
        [88.0, None, 85.0, 46.0, None],
        classes=("cat", "dog", "elk", "fox", "gnu"),
    )
    changes = class_changes(front)
    assert changes is not None
    assert changes.names == ("fox", "cat", "elk")  # nothing is known of the others
    assert changes.before.tolist() == [50.0, 90.0, 80.0]
    assert changes.change.tolist() == [[-30.0, -10.0, 1.0], [-4.0, -2.0, 5.0]]
    assert [trial.trial for trial in changes.trials] == ["0001", "0002"]


def test_a_picture_says_classes_and_points() -> None:
    front = front_of([90.0, 80.0, 50.5], [80.0, 81.2, 50.8])
    changes = class_changes(front)
    assert changes is not None
    figure = draw_classes(front, changes)
    rows = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert rows == ["0  90 %", "2  50 %", "1  80 %"]
    assert [text.get_text() for text in figure.texts] == ["-10", "0", "+1"]
    assert figure.axes[0].get_title() == "change of top-1, class by class"


@pytest.mark.parametrize("members", [1, 40])
def test_of_many_classes_both_ends_are_shown(members: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.permutation(np.arange(-500, 500)) / 10.0
    after = [(50.0 + points).tolist()] * members
    front = front_of([50.0] * 1000, *after, classes=tuple(f"class {i}" for i in range(1000)))
    changes = class_changes(front)
    assert changes is not None
    figure = draw_classes(front, changes)
    (image,) = figure.axes[0].get_images()
    shown = np.asarray(image.get_array())
    assert shown.shape == (30, min(members, 15))
    wanted = np.concatenate([np.arange(-500, -485), np.arange(485, 500)]) / 10.0
    np.testing.assert_allclose(shown[:, 0], wanted)
    title = "15 of 1000 classes that lose most, 15 that gain most"
    assert figure.axes[0].get_title() == title + ("; 15 of 40 members" if members == 40 else "")
    write_png(figure, tmp_path / "classes.png")
    picture = np.asarray(Image.open(tmp_path / "classes.png").convert("L"))
    assert picture.std() > 5
    assert max(picture.shape) < 2000


def test_nothing_is_known() -> None:
    assert class_changes(front_of([50.0], [])) is None
    assert class_changes(front_of([], [50.0])) is None
    assert class_changes(front_of([50.0])) is None


def test_a_name_is_no_formula() -> None:
    assert label("$x^2$") == r"\$x^2\$"
    assert label("a" * 24) == "a" * 24
    assert label("a" * 25) == "a" * 23 + "…"
