from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pruners import Plan, Step, load_method
from search.records.front import Front, build_front
from search.report.drawing import write_png
from search.report.kept import MOST, PANELS, draw_kept, draw_plan, kept_shares
from tests.search.trial_records import DENSE, record


@pytest.fixture
def shapes(tiny) -> tuple[dict, dict]:
    vit = tiny(img_size=(48, 32))
    dense = vit.shape().to_json()
    plan = Plan(
        steps=(
            Step(
                pruner=load_method(
                    "grouped",
                    criterion="magnitude",
                    units=["head", "v_dim", "neuron"],
                    compensate=False,
                ),
                thresholds={
                    "blocks.0.attn.head": 1 / 3,
                    "blocks.0.attn.v_dim": 0.5,
                    "blocks.2.mlp.neuron": 1.0,
                    "blocks.1.mlp.neuron": 0.25,
                },
            ),
            Step(pruner=load_method("evit", fuse=False), thresholds={"blocks.1.token": 0.5}),
            Step(
                pruner=load_method("magnitude"),
                thresholds={"blocks.1.mlp.fc1": 0.5, "blocks.1.mlp.fc2": 0.5},
            ),
        )
    )
    plan.apply(vit)
    return vit.shape().to_json(), dense


def front_of(shapes: tuple[dict, dict], members: int) -> Front:
    records = [
        dataclasses.replace(DENSE, shape=shapes[1]),
        *(record(f"{i:04d}", i / 99, 50.0 + i / 3, shape=shapes[0]) for i in range(1, members + 1)),
    ]
    return build_front(records, "effective_gmacs")


def test_kept_shares(shapes: tuple[dict, dict]) -> None:
    kept = kept_shares(*shapes)
    np.testing.assert_allclose(kept["heads"], [1 / 3, 1.0, 1.0])
    np.testing.assert_allclose(kept["neurons"], [1.0, 0.75, 0.0])
    np.testing.assert_allclose(kept["tokens"], [1.0, 13 / 25, 13 / 25])
    attention, mlp = 24 * 72 + 24 * 24, 2 * 24 * 72
    np.testing.assert_allclose(
        kept["weights"], [1.0, (attention + mlp / 2) / (attention + mlp), 1.0]
    )


def test_weights_of_channels_that_are_not_written_are_gone_not_masked(
    shapes: tuple[dict, dict],
) -> None:
    narrow = copy.deepcopy(shapes[1])
    narrow["blocks"][1].update(attn_out=12, mlp_out=6)
    half = 24 * 96 / 2
    narrow["nonzero"] = {"blocks.1.mlp.fc1": int(half)}
    weights = 24 * 72 + 12 * 24 + 24 * 96 + 6 * 96
    np.testing.assert_allclose(
        kept_shares(narrow, shapes[1])["weights"], [1.0, (weights - half) / weights, 1.0]
    )


@pytest.mark.parametrize("members", [0, 1, MOST, 40])
def test_the_front_is_drawn_for_any_number_of_members(
    members: int, shapes: tuple[dict, dict], tmp_path: Path
) -> None:
    front = front_of(shapes, members)
    assert len(front.members) == members
    figure = draw_kept(front)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == max(1, min(members, MOST))
    if members:
        assert labels[0].startswith("0001  0.01x")
        assert labels[-1].startswith(f"{members:04d}")
    assert [axes.get_title() for axes in figure.axes[: len(PANELS)]] == list(PANELS.values())
    write_png(figure, tmp_path / "kept.png")
    picture = np.asarray(Image.open(tmp_path / "kept.png").convert("L"))
    assert picture.std() > 5  # not blank
    assert min(picture.shape) > 150


def test_cells_hold_the_shares(shapes: tuple[dict, dict]) -> None:
    figure = draw_plan(*shapes)
    (image,) = figure.axes[0].get_images()
    kept = kept_shares(*shapes)
    np.testing.assert_allclose(image.get_array(), [kept[panel] for panel in PANELS])
    said = {text.get_position(): text.get_text() for text in figure.texts}
    assert {place: said[place] for place in said if min(place) >= 0 and place[1] <= 3} == {
        (0, 0): "33",
        (1, 1): "75",
        (2, 1): "0",
        (1, 2): "52",
        (2, 2): "52",
        (1, 3): f"{100 * kept['weights'][1]:.0f}",
    }


def test_the_picture_of_a_plan_is_small(shapes: tuple[dict, dict], tmp_path: Path) -> None:
    shape, dense = (s | {"blocks": s["blocks"] * 8} for s in shapes)  # 24 blocks
    write_png(draw_plan(shape, dense), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size < 60_000
    assert np.asarray(Image.open(tmp_path / "plan.png").convert("L")).std() > 5


def test_a_narrower_stream_is_said_beside_the_blocks(shapes: tuple[dict, dict]) -> None:
    cut, dense = copy.deepcopy(shapes[0]), shapes[1]
    cut["dim"] = 6  # of 24
    drawn = [text.get_text() for text in draw_plan(cut, dense).texts]
    assert "kept (%; dark: all); width 25" in drawn
    labels = draw_kept(front_of((cut, dense), 2)).axes[0].get_yticklabels()
    assert all(label.get_text().endswith(" %; width 25") for label in labels)
    labels = draw_kept(front_of(shapes, 2)).axes[0].get_yticklabels()
    assert all(label.get_text().endswith(" %") for label in labels)
