from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruners import load_method
from search.space.allocation import Allocation
from search.space.build import STEPS, space_step
from search.space.deviating import (
    ABSENT,
    SITE_DEVIATION,
    SPREAD,
    ResidualStep,
    deviated,
)
from search.space.sampled import LayerStep
from search.space.step import Rung, SpaceStep
from search.sweep.parts import StepSpec
from search.sweep.spec import SweepError

NEURON = "blocks.1.mlp.neuron"


def step(method: str = "grouped", kind: str = "residual", max_share: float = 0.9, **own: float):
    """A step whose method proposes `own` at half of the cost (block_1_mlp_neuron=0.3)."""
    pruner = load_method(method)
    rungs = ()
    if own:
        sites = {name.replace("_", ".", 3): share for name, share in own.items()}
        grid = {site: np.array([max_share, share, 0.0]) for site, share in sites.items()}
        curve = Allocation(budgets=np.array([0.0, 0.5, 1.0]), shares=grid)
        rungs = (Rung(pruner=pruner, own=curve),)
    return STEPS[kind](label="x", pruner=pruner, max_share=max_share, rungs=rungs)


def shares(space_step: SpaceStep, dense, parameters: dict, budget: float = 0.5, scale: float = 1.0):
    scales = dict.fromkeys(space_step.groups(dense), scale)
    return space_step.shares(dense, dense, {"budget": 0.5, **parameters}, budget, scales)


@pytest.fixture
def dense(tiny):
    return tiny().shape()


def test_shares_are_sampled_by_base_and_slope_or_site_by_site(dense) -> None:
    sites = load_method("grouped").sites(dense)
    flat = shares(step(kind="tied"), dense, {"x.base": 0.5, "x.slope": 0.0})
    assert flat == dict.fromkeys(sites, 0.5)
    sloped = shares(step(kind="tied"), dense, {"x.base": 0.5, "x.slope": 0.4})
    assert [sloped[f"blocks.{i}.mlp.neuron"] for i in range(3)] == pytest.approx([0.3, 0.5, 0.7])
    parameters = {f"x.{site}": 0.1 * i for i, site in enumerate(sites)}
    each = shares(step(kind="layer"), dense, parameters, scale=2.0)
    assert each == pytest.approx({site: min(0.9, 0.2 * i) for i, site in enumerate(sites)})
    assert set(
        shares(step(kind="tied"), dense, {"x.base": 0.5, "x.slope": 0.0}, scale=math.inf).values()
    ) == {0.9}


def test_without_a_deviation_it_is_the_methods_own_allocation(dense) -> None:
    own = {f"blocks_{i}_attn_head": 0.1 * i for i in range(3)}
    own |= {f"blocks_{i}_mlp_neuron": 0.2 + 0.1 * i for i in range(3)}
    residual = step(**own)
    neutral = residual.neutral(dense)
    found = shares(residual, dense, neutral)
    assert found == pytest.approx({k.replace("_", ".", 3): v for k, v in own.items()})
    milder = shares(residual, dense, neutral, budget=0.75)
    assert milder == pytest.approx({site: share / 2 for site, share in found.items()})
    # The scale is the exponent of the budget: 0.75 ** (log 0.5 / log 0.75) = 0.5.
    assert shares(
        residual, dense, neutral, budget=0.75, scale=math.log(0.5) / math.log(0.75)
    ) == pytest.approx(found)
    assert set(shares(residual, dense, neutral, scale=math.inf).values()) == {0.9}


def test_deviations_move_the_log_odds(dense) -> None:
    own = {f"blocks_{i}_{k}": 0.4 for i in range(3) for k in ("attn_head", "mlp_neuron")}
    residual = step(**own)
    found = shares(residual, dense, {**residual.neutral(dense), "x.slope": 0.5, "x.mlp": -0.25})
    for i in range(3):
        for branch, unit, side in (("attn", "head", 1.0), ("mlp", "neuron", -1.0)):
            deviation = 0.5 * (i - 1) + 0.25 * side
            logit = math.log(0.4 / 0.6) + SPREAD * deviation
            expected = 1.0 / (1.0 + math.exp(-logit))
            assert found[f"blocks.{i}.{branch}.{unit}"] == pytest.approx(expected)


@given(st.floats(0.0, 1.0), st.floats(-2.0, 2.0))
def test_a_deviation_keeps_shares_shares_and_can_be_undone(share: float, deviation: float) -> None:
    moved = deviated(share, deviation)
    assert 0.0 <= moved <= 1.0
    assert deviated(0.0, deviation) == 0.0
    assert deviated(1.0, deviation) == 1.0
    if 1e-6 < share < 1.0 - 1e-6:
        assert (moved > share) == (deviation > 0.0) or abs(deviation) < 1e-6
        assert deviated(moved, -deviation) == pytest.approx(share, rel=1e-6)


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a shape does not change
)
@given(slope=st.floats(-1.0, 1.0), mlp=st.floats(-1.0, 1.0))
def test_slope_and_branch_are_deviations_of_sites(slope: float, mlp: float, dense) -> None:
    own = {f"blocks_{i}_{k}": 0.3 + 0.1 * i for i in range(3) for k in ("attn_head", "mlp_neuron")}
    residual = step(**own)
    parameters = {"x.split": 0.7, "x.slope": slope, "x.mlp": mlp}
    sites = residual.by_site(dense, parameters)
    assert set(sites) == set(residual.refined().ranges(dense))
    assert all(abs(v) <= SITE_DEVIATION for k, v in sites.items() if k != "x.split")
    assert shares(residual.refined(), dense, sites) == shares(residual, dense, parameters)


def test_only_what_a_method_removes_whole_goes_whole(dense) -> None:
    every = {site.replace(".", "_", 3): 0.2 for site in load_method("wdpruning").sites(dense)}
    head = (
        next(site for site in every if "heads" in site)
        if any("heads" in s for s in every)
        else None
    )
    gone = step("wdpruning", max_share=0.5, **{**every, "blocks_1_block": 1.0})
    found = shares(gone, dense, gone.neutral(dense))
    assert found["blocks.1.block"] == 1.0
    assert found["blocks.0.block"] == 0.0
    halfway = shares(gone, dense, gone.neutral(dense), budget=0.8)
    assert halfway["blocks.1.block"] == 0.0
    if head:
        site = head.replace("_", ".", 3)
        whole = step("wdpruning", max_share=0.5, **{**every, head: 1.0})
        assert shares(whole, dense, whole.neutral(dense))[site] == 1.0
        assert shares(whole, dense, whole.neutral(dense), budget=0.65)[site] == 0.5


def test_deviations_never_take_a_site_whole(dense) -> None:
    own = {f"blocks_{i}_{k}": 0.89 for i in range(3) for k in ("attn_head", "mlp_neuron")}
    residual = step(**own).refined()
    parameters = {"x.split": 1.0} | {f"x.{s}": 2.0 for s in residual.pruner.sites(dense)}
    assert set(shares(residual, dense, parameters).values()) == {0.9}


def test_a_step_is_absent_below_a_part_of_its_split() -> None:
    residual = step()
    assert residual.weight({"x.split": ABSENT}) == 0.0
    assert residual.weight({"x.split": (1 + ABSENT) / 2}) == pytest.approx(0.5)
    assert residual.weight({"x.split": 1.0}) == 1.0
    tied = step(kind="tied")
    assert (tied.weight({"x.present": True}), tied.weight({"x.present": False})) == (1.0, 0.0)


def test_parameters_are_those_that_do_something(dense) -> None:
    assert set(step("tome").ranges(dense)) == {"x.split", "x.slope"}
    assert set(step("grouped").ranges(dense)) == {"x.split", "x.slope", "x.mlp"}
    assert set(step("magnitude").ranges(dense)) == {"x.split", "x.slope", "x.mlp"}
    heads = ResidualStep(label="x", pruner=load_method("grouped", units=["head"]), max_share=0.9)
    assert set(heads.ranges(dense)) == {"x.split", "x.slope"}


def test_the_rung_of_the_nearest_budget_is_taken() -> None:
    curve = Allocation(budgets=np.array([0.0, 1.0]), shares={})
    rungs = tuple(Rung(pruner=load_method("uvc", budget=b), own=curve) for b in (0.4, 0.7))
    learner = ResidualStep(label="x", pruner=load_method("uvc"), max_share=0.9, rungs=rungs)
    assert [learner.rung(b).pruner.budget for b in (0.3, 0.54, 0.56, 0.9)] == [0.4, 0.4, 0.7, 0.7]
    assert step().rung(0.5) is None


def test_a_step_learns_once_for_each_of_its_budgets() -> None:
    spec = StepSpec.model_validate({"method": "uvc", "budgets": [0.4, 0.7], "epochs": 2})
    learners = space_step("uvc", spec, epochs=1).learners()
    assert learners == [load_method("uvc", epochs=2, budget=budget) for budget in (0.4, 0.7)]
    alone = space_step("uvc", StepSpec(method="uvc"), epochs=1)
    assert (alone.learners(), type(alone)) == ([load_method("uvc")], ResidualStep)
    plain = space_step("grouped", StepSpec(method="grouped", space="layer"), epochs=1)
    assert (plain.learners(), type(plain)) == ([], LayerStep)


def test_options_of_a_step_are_checked() -> None:
    with pytest.raises(SweepError, match="max_share of step tome is 1; give less than 1"):
        space_step("tome", StepSpec(method="tome", max_share=1.0), epochs=1)
