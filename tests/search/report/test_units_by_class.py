from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.report.drawing import write_png
from search.report.units_by_class import binned, by_class_served, draw_units


def test_bins_are_means() -> None:
    mask = np.arange(5 * 7, dtype=float).reshape(5, 7)
    np.testing.assert_array_equal(binned(mask, 5, 7), mask)
    rows = binned(mask, 2, 7)  # rows 0 and 1, and 2 to 4
    np.testing.assert_allclose(rows, [mask[:2].mean(0), mask[2:].mean(0)])
    columns = binned(mask, 5, 3)  # 0 and 1, 2 and 3, 4 to 6
    parts = [mask[:, :2], mask[:, 2:4], mask[:, 4:]]
    np.testing.assert_allclose(columns, np.stack([part.mean(1) for part in parts], axis=1))
    assert binned(mask, 1, 1).tolist() == [[pytest.approx(mask.mean())]]


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (60, 900)])
def test_bins_of_equal_size_keep_the_mean(rows: int, columns: int) -> None:
    mask = np.random.default_rng(0).normal(size=(rows * 2, columns * 3))
    small = binned(mask, rows, columns)
    assert small.shape == (rows, columns)
    np.testing.assert_allclose(small.mean(), mask.mean(), atol=1e-12)
    np.testing.assert_allclose(small[0, 1], mask[:2, 3:6].mean())


def test_units_are_sorted_by_the_class_they_serve() -> None:
    mask = np.array(
        [[0.1, 0.9, 0.2, 0.8, 0.0], [0.5, 0.0, 0.9, 0.7, 0.0], [0.4, 0.1, 0.0, 0.1, 1.0]]
    )
    order = by_class_served(mask)
    assert order.tolist() == [1, 3, 2, 0, 4]
    served = mask.argmax(axis=0)[order]
    assert served.tolist() == sorted(served.tolist())


def test_blocks_stand_apart_and_rows_have_names() -> None:
    rng = np.random.default_rng(0)
    masks = {f"blocks.{b}.attn.head": rng.random((3, 4)) for b in (10, 2)}
    masks |= {f"blocks.{b}.mlp.neuron": rng.random((3, 8 + b)) for b in (10, 2)}
    figure = draw_units(masks, ("cat", "dog", "$elk$"))
    heads, neurons = figure.axes[:2]
    assert (heads.get_title(loc="left"), neurons.get_title(loc="left")) == ("heads", "neurons")
    assert [tick.get_text() for tick in neurons.get_xticklabels()] == ["2", "10"]
    assert [tick.get_text() for tick in heads.get_yticklabels()] == ["cat", "dog", r"\$elk\$"]
    first, second = (image.get_extent() for image in neurons.get_images())
    assert (first[:2], second[:2]) == ([0.0, 10.0], [11.0, 29.0])
    shown = np.concatenate([np.asarray(i.get_array()) for i in neurons.get_images()], axis=1)
    original = np.concatenate([masks[f"blocks.{b}.mlp.neuron"] for b in (2, 10)], axis=1)
    assert sorted(shown.ravel()) == sorted(original.ravel())


def test_many_classes_and_units_make_a_bounded_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {f"blocks.{b}.attn.head": rng.random((300, 6)) for b in range(12)}
    masks |= {f"blocks.{b}.mlp.neuron": rng.random((300, 1536)) for b in range(12)}
    figure = draw_units(masks)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == [
        "heads: 300 classes averaged into 60",
        "neurons: 300 classes averaged into 60; 18432 neurons averaged into 900",
    ]
    write_png(figure, tmp_path / "units.png")
    assert (tmp_path / "units.png").stat().st_size < 1_000_000
    picture = np.asarray(Image.open(tmp_path / "units.png").convert("L"))
    assert picture.std() > 5
    assert max(picture.shape) < 2000


def test_other_units_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"depth.*give sites of heads or neurons"):
        draw_units({"depth": np.ones((2, 3))})
