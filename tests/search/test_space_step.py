from __future__ import annotations

import math

import pytest

from pruners import load_method
from search.space_step import SpaceStep, space_step
from search.sweep import StepSpec

PARAMETERS = {"x.base": 0.5, "x.slope": 0.0, "x.blocks.1.mlp.neuron": 0.3}


def share(site: str = "blocks.1.mlp.neuron", own: float | None = None, **changed: object) -> float:
    known = {"kind": "tied", "max_share": 0.9, "scale": 1.0, "units": 8, "parameters": PARAMETERS}
    known |= changed
    step = SpaceStep(
        label="x",
        pruner=load_method("uvc"),
        kind=known["kind"],
        max_share=known["max_share"],
    )
    return step.share(site, known["units"], own, known["parameters"], known["scale"], last_block=4)


def test_shares_are_sampled_by_base_and_slope_or_site_by_site() -> None:
    assert share() == 0.5
    assert share(kind="layer") == 0.3
    sloped = {**PARAMETERS, "x.slope": 0.4}
    assert [share(f"blocks.{i}.mlp.neuron", parameters=sloped) for i in (0, 2, 4)] == (
        pytest.approx([0.3, 0.5, 0.7])
    )
    assert share(scale=math.inf) == share(scale=10.0) == 0.9


def test_what_a_method_proposes_is_kept_at_base_one_half_and_scaled() -> None:
    assert share(kind="residual", own=0.24) == pytest.approx(0.24)
    assert share(kind="residual", own=0.24, scale=2.0) == pytest.approx(0.48)
    assert share(kind="residual", own=0.0, scale=math.inf) == 0.0
    assert share(kind="residual", own=0.24, scale=math.inf) == 0.9


def test_only_what_a_method_removes_whole_goes_whole() -> None:
    head = "blocks.1.attn.heads.2.v_dim"
    assert share(head, kind="residual", own=1.0) == 1.0
    assert share(head, kind="residual", own=1.0, scale=0.97) == 1.0  # 7.76 of 8 dims
    assert share(head, kind="residual", own=1.0, scale=0.5) == 0.5
    assert share(head, kind="residual", own=0.99, scale=9.0) == 0.9
    block = "blocks.1.block"
    assert share(block, kind="residual", own=1.0, scale=0.6) == 1.0
    assert share(block, kind="residual", own=1.0, scale=0.4) == 0.0
    assert share(block, scale=math.inf) == 0.0


def test_a_step_learns_once_for_each_of_its_budgets() -> None:
    spec = StepSpec.model_validate({"method": "uvc", "budgets": [0.4, 0.7], "epochs": 2})
    learners = space_step("uvc", spec, epochs=1).learners()
    assert learners == [load_method("uvc", epochs=2, budget=budget) for budget in (0.4, 0.7)]
    alone = space_step("uvc", StepSpec(method="uvc"), epochs=1)
    assert (alone.learners(), alone.kind) == ([load_method("uvc")], "residual")
    plain = space_step("grouped", StepSpec(method="grouped"), epochs=1)
    assert (plain.learners(), plain.kind) == ([], "tied")
