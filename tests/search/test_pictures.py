from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pruners import Plan, Step, load_method
from search.pictures import front_html, front_png, kept_png, kept_shares
from search.results import build_front
from tests.search.test_results import DENSE, record


@pytest.fixture
def shapes(tiny) -> tuple[dict, dict]:
    vit = tiny(img_size=(48, 32))
    dense = vit.shape().to_json()
    plan = Plan(
        steps=(
            Step(
                pruner=load_method(
                    "grouped", criterion="magnitude", units=["head", "v_dim", "neuron"]
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


def test_kept_shares(shapes: tuple[dict, dict]) -> None:
    kept = kept_shares(*shapes)
    np.testing.assert_allclose(kept["heads"], [1 / 3, 1.0, 1.0])
    np.testing.assert_allclose(kept["neurons"], [1.0, 0.75, 0.0])
    np.testing.assert_allclose(kept["tokens"], [1.0, 13 / 25, 13 / 25])
    attention, mlp = 24 * 72 + 24 * 24, 2 * 24 * 72
    np.testing.assert_allclose(
        kept["weights"], [1.0, (attention + mlp / 2) / (attention + mlp), 1.0]
    )


def test_the_page_is_self_contained_and_says_the_plans(shapes: tuple[dict, dict]) -> None:
    records = [
        DENSE,
        record("0001", 0.5, 70.0, shape=shapes[0]),
        record("0002", 0.6, 60.0, plan_line="evit: tokens -11 %"),
        record("0003", 0.2, None, "failed"),
    ]
    page = front_html(build_front(records, "effective_gmacs"), records)
    assert '<script src="http' not in page
    assert "plotly.js v" in page
    for words in (
        "grouped: neurons -50 %",
        "evit: tokens -11 %",
        "hypervolume 0.3500",
        "effective GMACs",
    ):
        assert words in page
    assert "0003 grouped" not in page


@pytest.mark.parametrize("members", [0, 1, 12])
def test_pictures_are_drawn_for_any_number_of_members(
    members: int, shapes: tuple[dict, dict], tmp_path
) -> None:
    import dataclasses

    dense = dataclasses.replace(DENSE, shape=shapes[1])
    records = [
        dense,
        *(record(f"{i:04d}", i / 15, 50.0 + i, shape=shapes[0]) for i in range(1, members + 1)),
    ]
    front = build_front(records, "effective_gmacs")
    assert len(front.members) == members
    for draw in (front_png, kept_png):
        path = tmp_path / f"{draw.__name__}.png"
        draw(front, records, path)
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 5  # not blank
        assert min(picture.shape) > 150
    assert len(list(tmp_path.iterdir())) == 2
