from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from pruners import ViTShape, cost_of, load_method
from search.records import pareto
from search.space.allocation import own_allocation
from search.space.build import build_space
from search.space.space import Proposal
from search.space.step import Rung
from search.strategy.proposer import Proposer, Told
from search.sweep.spec import Sweep, SweepFailedError

PAIR: list[dict[str, Any]] = [{"method": "grouped"}, {"method": "magnitude"}]


def sweep_with(**changes: Any) -> Sweep:
    return Sweep.model_validate(
        {
            "name": "a",
            "budget": [0.5, 0.9],
            "trials": 20,
            "ladder": 2,
            "alone": 0,
            "epochs": 1,
            "sampler": "random",
            "model": {"name": "x"},
            "data": {"train": "t", "val": "v", "test": "s"},
            "steps": PAIR,
            **changes,
        }
    )


@pytest.fixture
def shape(tiny) -> ViTShape:
    return tiny().shape()


@pytest.fixture
def proposer(shape: ViTShape) -> Callable[..., Proposer]:
    def build(*, earlier: list[dict] | None = None, **changes: Any) -> Proposer:
        sweep = sweep_with(**changes)
        return Proposer(sweep=sweep, space=build_space(sweep, shape), earlier=earlier or ())

    return build


def asked(proposer: Proposer, count: int, start: int = 1) -> list[tuple[str, Proposal]]:
    return [proposer.ask(f"{i:04d}", i) for i in range(start, start + count)]


def quality(proposal: Proposal) -> float:
    """Top-1 as a smooth function of the thresholds: early blocks and heads are worth more."""
    lost = 0.0
    for step in proposal.plan.steps:
        for site, share in step.thresholds.items():
            worth = 1.5 - 0.6 * int(site.split(".")[1]) + (2.0 if "attn" in site else 0.0)
            lost += max(worth, 0.1) * share**2
    return 80.0 - 4.0 * lost


def searched(proposer: Proposer, count: int, start: int = 1) -> list[tuple[str, Proposal]]:
    """Ask and tell what `quality` says, one by one."""
    found = []
    for i in range(start, start + count):
        found.append(proposer.ask(f"{i:04d}", i))
        proposal = found[-1][1]
        proposer.tell(f"{i:04d}", quality(proposal), proposal.cost_ratio)
    return found


def told_to_optuna(proposer: Proposer) -> list[optuna.trial.FrozenTrial]:
    return [t for t in proposer.study.get_trials() if t.state != TrialState.WAITING]


def outcome(trial: optuna.trial.FrozenTrial) -> tuple[Any, ...]:
    """Everything but the time."""
    return trial.state, trial.values, trial.params, trial.user_attrs, trial.constraints


def plans(found: list[tuple[str, Proposal]]) -> list[dict]:
    return [proposal.plan.to_json() for _, proposal in found]


# First plans.


@pytest.mark.parametrize(("ladder", "alone"), [(2, 0), (2, 1), (0, 2), (0, 0), (3, 2)])
def test_all_together_come_first_then_each_alone(ladder: int, alone: int, proposer) -> None:
    p = proposer(trials=40, ladder=ladder, alone=alone, refine=0.0)
    expected = [*p.space.ladder(), *p.space.alone()]
    found = asked(p, len(expected) + 2)
    singles = ["alone"] * (len(expected) - ladder)
    assert [origin for origin, _ in found] == ["ladder"] * ladder + singles + ["search"] * 2
    assert [proposal.parameters for _, proposal in found[:-2]] == expected
    assert bool(singles) == bool(alone)


def test_an_earlier_front_follows_the_ladder_within_bounds(proposer) -> None:
    earlier = [
        {"budget": 0.1, "grouped.split": 3.0, "grouped.slope": -0.4, "evit.split": 0.5, "x": "y"},
        {"budget": 0.7, "grouped.split": 0.5, "magnitude.split": 0.9, "learner": "x_pruner"},
    ]
    p = proposer(trials=4, earlier=earlier)
    found = asked(p, 5)
    assert [origin for origin, _ in found] == ["ladder"] * 2 + ["earlier"] * 2 + ["search"]
    names = {*p.space.ranges(), *p.space.choices()}
    assert all(set(proposal.parameters) == names for _, proposal in found)
    first, second = found[2][1].parameters, found[3][1].parameters
    assert (first["budget"], first["grouped.split"], first["grouped.slope"]) == (0.5, 1.0, -0.4)
    assert [second[k] for k in ("budget", "grouped.split", "magnitude.split")] == [0.7, 0.5, 0.9]


def test_choices_of_an_earlier_sweep_are_kept_where_they_exist(proposer) -> None:
    steps = [{**step, "space": "tied"} for step in PAIR]
    kept = {"budget": 0.6, "grouped.present": False, "magnitude.present": True}
    p = proposer(trials=4, steps=steps, earlier=[kept, {**kept, "grouped.present": "perhaps"}])
    _, proposal = asked(p, 3)[2]
    assert proposal.parameters["grouped.present"] is False
    assert not proposal.plan.steps[0].active
    assert "grouped.present" not in p._within({**kept, "grouped.present": "perhaps"})


@pytest.mark.parametrize(("before", "now"), [(5, 3), (3, 5)])
def test_an_earlier_model_may_have_another_depth(before: int, now: int, tiny) -> None:
    sweep = sweep_with(steps=[{"method": "grouped", "space": "layer"}], trials=4, ladder=1)
    old = build_space(sweep, tiny(depth=before).shape())
    known = {**old.ladder()[0], "grouped.blocks.1.mlp.neuron": 0.625}
    p = Proposer(sweep=sweep, space=build_space(sweep, tiny(depth=now).shape()), earlier=[known])
    origin, proposal = asked(p, 2)[1]
    assert origin == "earlier"
    assert set(proposal.parameters) == set(p.space.ranges()) | set(p.space.choices())
    for block in range(min(before, now)):
        name = f"grouped.blocks.{block}.mlp.neuron"
        assert proposal.parameters[name] == known[name]


# No plan twice.


def test_no_plan_is_tried_twice(proposer) -> None:
    # Whole heads alone: few plans are within the budget, and few cost what is asked for.
    p = proposer(steps=[{"method": "grouped", "units": ["head"]}], budget=[0.8, 0.98], trials=400)
    with pytest.raises(SweepFailedError, match=r"200 proposals in a row .* give a wider budget"):
        searched(p, 399)
    heads = [
        tuple(block.heads for block in told.proposal.plan.shape(p.space.dense).blocks)
        for told in p.told
    ]
    assert len(set(heads)) == len(heads)
    costs = [told.cost for told in p.told]
    assert all(0.8 <= cost <= 0.98 for cost in costs)
    # Three blocks keep 1 to 3 of 3 heads each, not all of them; those of equal cost may be missing.
    assert len(set(costs)) >= 3
    assert len(heads) <= 3**3 - 1
    assert TrialState.RUNNING not in {t.state for t in p.study.get_trials()}


def test_two_methods_that_leave_the_same_are_two_plans(proposer) -> None:
    steps = [{"method": "magnitude"}, {"method": "taylor"}]
    p = proposer(steps=steps, trials=40, ladder=1, alone=1)
    found = [proposal for _, proposal in asked(p, 3)]
    alone = [[s.pruner.name for s in f.plan.steps if s.active] for f in found[1:]]
    assert alone == [["magnitude"], ["taylor"]]
    assert len({str(f.plan.shape(p.space.dense).to_json()) for f in found[1:]}) == 1


@pytest.mark.parametrize("excess", [-0.5, 0.5])
def test_of_a_known_plan_optuna_is_told_what_is_known(excess: float, proposer) -> None:
    p = proposer(trials=4, refine=0.0, earlier=proposer().space.ladder()[:1])
    found = asked(p, 2)
    p.tell("0001", 61.0, 0.51, {"max_drop": excess})
    found += asked(p, 1, start=3)
    assert found[2][0] == "search"
    assert plans(found)[0] not in plans(found[1:])
    same = [t for t in told_to_optuna(p) if t.params == found[0][1].parameters]
    assert [t.state for t in same] == [TrialState.COMPLETE] * 2
    assert [t.values for t in same] == [[61.0, 0.51]] * 2
    assert [t.constraints for t in same] == [{"max_drop": excess}] * 2


@pytest.mark.parametrize("ends", ["runs", "failed"])
def test_of_a_plan_whose_result_is_unknown_the_repetition_fails(ends: str, proposer) -> None:
    p = proposer(trials=4, refine=0.0, earlier=proposer().space.ladder()[:1])
    found = asked(p, 2)
    if ends == "failed":
        p.fail("0001")
    asked(p, 1, start=3)
    same = [t for t in told_to_optuna(p) if t.params == found[0][1].parameters]
    first = {"runs": TrialState.RUNNING, "failed": TrialState.FAIL}
    assert [t.state for t in same] == [first[ends], TrialState.FAIL]


def test_a_repeated_plan_stays_stopped(proposer) -> None:
    p = proposer(trials=4, refine=0.0, earlier=proposer().space.ladder()[:1])
    found = asked(p, 2)
    p.tell("0001", 40.0, 0.5, stopped=True)
    asked(p, 1, start=3)
    same = [t for t in told_to_optuna(p) if t.params == found[0][1].parameters]
    assert [t.values for t in same] == [[40.0, 0.5]] * 2
    assert [t.user_attrs.get("stopped") for t in same] == [True, True]
    assert p.told == []


def test_a_gaussian_process_goes_on_after_a_repeated_plan(proposer) -> None:
    # It refuses complete trials that have not all the same constraints.
    p = proposer(sampler="gp", trials=40, earlier=proposer().space.ladder()[:1])
    for i in range(1, 12):
        _, proposal = p.ask(f"{i:04d}", i)
        p.tell(f"{i:04d}", quality(proposal), proposal.cost_ratio, {"max_drop": -1.0})
    states = [t.state for t in told_to_optuna(p)]
    assert states == [TrialState.COMPLETE] * 12


# What Optuna is told.


@pytest.mark.parametrize(
    ("top1", "cost", "constraints", "state"),
    [
        (50.0, 0.6, None, TrialState.COMPLETE),
        (50.0, 0.6, {"max_drop": 0.1}, TrialState.COMPLETE),
        (50.0, 0.6, {"max_drop": math.nan}, TrialState.FAIL),
        (math.nan, 0.6, None, TrialState.FAIL),
        (math.inf, 0.6, None, TrialState.FAIL),
        (50.0, math.nan, None, TrialState.FAIL),
        (50.0, math.inf, None, TrialState.FAIL),
        (math.nan, 0.6, {"max_drop": math.nan}, TrialState.FAIL),
    ],
)
def test_how_a_trial_ends(
    top1: float, cost: float, constraints: dict | None, state: TrialState, proposer
) -> None:
    p = proposer()
    asked(p, 2)
    p.tell("0002", top1, cost, constraints)
    assert [t.state for t in told_to_optuna(p)] == [TrialState.RUNNING, state]
    trial = told_to_optuna(p)[1]
    complete = state == TrialState.COMPLETE
    assert trial.values == ([top1, cost] if complete else None)
    assert trial.constraints == ((constraints or {}) if complete else {})
    assert [t.name for t in p.told] == (["0002"] if complete and not constraints else [])


def test_what_failed_is_told_as_failed(proposer) -> None:
    p = proposer()
    asked(p, 1)
    p.fail("0001")
    assert [t.state for t in told_to_optuna(p)] == [TrialState.FAIL]
    assert p.told == []


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "nsga2"])
def test_no_trial_stays_running(sampler: str, proposer) -> None:
    # Heads and tokens alone: half of what is sampled costs more or less than is asked for.
    steps = [{"method": "grouped", "units": ["head"]}, {"method": "evit"}]
    p = proposer(sampler=sampler, steps=steps, budget=[0.83, 0.86], trials=20)
    for i in range(1, 15):
        _, proposal = p.ask(f"{i:04d}", i)
        if i % 4 == 0:
            p.fail(f"{i:04d}")
        else:
            top1 = (40.0, 50.0, math.nan)[i % 3]
            p.tell(f"{i:04d}", top1, proposal.cost_ratio, stopped=i % 3 == 0)
    states = {t.state for t in told_to_optuna(p)}
    assert states == {TrialState.COMPLETE, TrialState.FAIL}
    assert len(told_to_optuna(p)) >= 16
    assert p.asked == {}


def test_a_second_time_telling_changes_nothing(proposer) -> None:
    p = proposer()
    asked(p, 3)
    p.tell("0001", 50.0, 0.6, {"max_drop": -1.0})
    p.tell("0002", 40.0, 0.6, stopped=True)
    before = [(t.state, t.values) for t in told_to_optuna(p)]
    p.tell("0001", 70.0, 0.5)
    p.tell("0002", 70.0, 0.5)
    p.fail("0001")
    p.tell("never", 70.0, 0.5)
    assert [(t.state, t.values) for t in told_to_optuna(p)] == before
    assert [(t.name, t.top1, t.cost) for t in p.told] == [("0001", 50.0, 0.6)]


def test_what_violates_a_constraint_is_not_on_the_front(proposer) -> None:
    p = proposer()
    asked(p, 5)
    p.tell("0001", 90.0, 0.5, {"max_params": 3.0, "max_drop": -1.0})  # beats all others
    p.tell("0002", 60.0, 0.7, {"max_params": 0.0, "max_drop": -1.0})
    p.tell("0003", 40.0, 0.6, {"max_params": -2.0, "max_drop": -1.0})
    p.tell("0004", 50.0, 0.8, {"max_params": -2.0, "max_drop": -1.0})
    p.tell("0005", 55.0, 0.65, {"max_params": -2.0, "max_drop": -1.0}, stopped=True)
    assert [t.name for t in p.front] == ["0003", "0002"]
    assert told_to_optuna(p)[0].constraints == {"max_params": 3.0, "max_drop": -1.0}
    assert [t.number for t in p.study.best_trials] == [1, 2, 4]  # Optuna agrees, but for the last


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_none_of_all_that_was_told_beats(
    proposer, points: list[tuple[int, int]]
) -> None:
    p = proposer()
    asked(p, len(points))
    for i, (cost, top1) in enumerate(points, start=1):
        p.tell(f"{i:04d}", 10.0 * top1, cost / 10.0)
    best = pareto.front([t.cost for t in p.told], [t.top1 for t in p.told])
    expected = {t.name for t, keeps in zip(p.told, best, strict=True) if keeps}
    assert {t.name for t in p.front} == expected
    assert [t.cost for t in p.front] == sorted(t.cost for t in p.front)


# The last trials vary the front site by site.


@pytest.mark.parametrize(("refine", "first"), [(0.3, 14), (0.5, 10), (0.33, 14), (0.0, 20)])
def test_refining_begins_with_the_last_share_of_the_trials(
    refine: float, first: int, proposer
) -> None:
    found = searched(proposer(refine=refine), 19)
    origins = [origin for origin, _ in found]
    expected = ["ladder"] * 2 + ["search"] * (first - 3)
    assert origins[: first - 1] == expected
    assert origins[first - 1 :] == ["refined"] * (20 - first)


def common(parameters: dict, other: dict) -> float:
    """Share of equal values, but for the budget."""
    names = [name for name in parameters if name != "budget"]
    return float(np.mean([parameters[name] == other[name] for name in names]))


def test_refined_plans_lie_near_the_front(proposer) -> None:
    p = proposer(trials=40, refine=0.6, ladder=0, seed=2)  # first plans are too much alike
    searched(p, 15)
    finer = p.finer
    before, after, changed = [], [], []
    for i in range(24, 40):
        members = p.front
        origin, proposal = p.ask(f"{i:04d}", i)
        assert origin == "refined"
        parameters, ranges = proposal.parameters, finer.ranges()
        assert set(parameters) == {*ranges, *finer.choices()}
        assert all(low <= parameters[name] <= high for name, (low, high) in ranges.items())
        cost = cost_of(proposal.plan.shape(finer.dense)).effective_macs
        assert proposal.cost_ratio == pytest.approx(cost / finer.dense_cost)
        assert 0.5 <= proposal.cost_ratio <= 0.9
        by_site = {
            t.name: t.proposal.parameters
            if set(t.proposal.parameters) == set(parameters)
            else p.space.by_site(t.proposal.parameters)
            for t in p.told
        }
        alike = {name: common(parameters, other) for name, other in by_site.items()}
        name = min(members, key=lambda t: abs(t.cost - parameters["budget"])).name
        assert alike[name] == max(alike.values())
        changed.append(1.0 - alike[name])
        for k, (low, high) in ranges.items():
            if k != "budget" and low < parameters[k] < high and parameters[k] != by_site[name][k]:
                before.append((by_site[name][k] - low) / (high - low))
                after.append((parameters[k] - low) / (high - low))
        p.tell(f"{i:04d}", quality(proposal), proposal.cost_ratio)
    assert 0.15 < np.mean(changed) < 0.45
    # What is changed stays near: the mean distance is 0.8 standard deviations of 0.15.
    assert 0.09 < np.mean(np.abs(np.subtract(after, before))) < 0.16
    assert np.polyfit(before, after, 1)[0] == pytest.approx(1.0, abs=0.25)
    assert any(t.name >= "0024" for t in p.front)  # refined ones are themselves refined


def test_refined_plans_are_not_optunas_but_their_results_count(proposer) -> None:
    p = proposer()
    searched(p, 13)
    before = len(told_to_optuna(p))
    asked(p, 4, start=14)
    p.tell("0014", 99.0, 0.5)
    p.tell("0015", 99.0, 0.5, stopped=True)
    p.fail("0016")
    p.tell("0017", 99.5, 0.4, {"max_drop": 1.0})
    assert len(told_to_optuna(p)) == before
    assert [t.name for t in p.told][-2:] == ["0013", "0014"]
    assert p.front[0].name == "0014"
    assert p.asked == {}


@pytest.mark.parametrize("kind", ["tied", "layer"])
def test_without_a_finer_space_optuna_goes_on(kind: str, proposer) -> None:
    steps = [{**step, "space": kind} for step in PAIR]
    found = searched(proposer(steps=steps, trials=8, ladder=1), 8)
    assert [origin for origin, _ in found[-4:]] == ["search"] * 4


def test_where_nothing_is_told_optuna_goes_on(proposer) -> None:
    p = proposer(trials=8, ladder=1)
    assert [origin for origin, _ in asked(p, 4, start=6)] == ["ladder"] + ["search"] * 3


def test_a_learner_stays_what_it_is_when_a_plan_is_refined(shape: ViTShape) -> None:
    steps = [{"method": "x_pruner"}, {"method": "vit_slim"}, {"method": "magnitude"}]
    sweep = sweep_with(steps=steps, trials=20, refine=0.5)
    p = Proposer(sweep=sweep, space=build_space(sweep, shape))
    searched(p, 9)
    for i in range(10, 16):
        origin, proposal = p.ask(f"{i:04d}", i)
        budget = proposal.parameters["budget"]
        member = min(p.front, key=lambda t: abs(t.cost - budget))
        assert origin == "refined"
        assert proposal.parameters["learner"] == member.proposal.parameters["learner"]


# Going on, seeds, and whether it helps.


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "nsga3"])
@pytest.mark.parametrize("done", [1, 8, 15])
def test_asked_and_told_the_same_it_goes_on_the_same_way(sampler: str, done: int, proposer) -> None:
    both = p, again = proposer(sampler=sampler), proposer(sampler=sampler)
    for one in both:
        searched(one, done)
        for i, (_, proposal) in enumerate(asked(one, 2, start=done + 1), start=done + 1):
            one.tell(f"{i:04d}", quality(proposal), proposal.cost_ratio)
    assert list(map(outcome, told_to_optuna(again))) == list(map(outcome, told_to_optuna(p)))
    expected = searched(p, 4, start=done + 3)
    assert searched(again, 4, start=done + 3) == expected
    assert again.front == p.front


def test_asked_and_told_the_same_a_gaussian_process_goes_on_the_same_way(proposer) -> None:
    one, again = (searched(proposer(sampler="gp", trials=40), 13) for _ in range(2))
    assert one == again


def test_proposals_name_the_scores_that_are_known(tiny, batches) -> None:
    vit, sweep = tiny(), sweep_with(trials=8)
    rungs = {}
    for label in sweep.labels:
        method = load_method(label)
        own = own_allocation(method, vit.shape(), method.score(vit, batches), 0.9)
        rungs[label] = [Rung(pruner=method, own=own, path=label)]
    found = searched(
        Proposer(sweep=sweep, space=build_space(sweep, vit.shape()).measured(rungs)), 7
    )
    assert {proposal.scores for _, proposal in found[3:]} == {"", "grouped"}


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "nsga3"])
def test_a_seed_decides_what_is_proposed(sampler: str, proposer) -> None:
    one, same, other = (
        plans(searched(proposer(sampler=sampler, ladder=0, seed=seed), 19)) for seed in (3, 3, 4)
    )
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


def area(members: list[Told]) -> float:
    return pareto.hypervolume(
        [t.cost for t in members],
        [t.top1 for t in members],
        reference_cost=0.9,
        reference_accuracy=0.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_searching_beats_drawing_at_random(seed: int, proposer) -> None:
    search = proposer(sampler="tpe", trials=41, seed=seed)
    drawn = proposer(trials=41, ladder=0, refine=0.0, seed=seed)
    searched(search, 40)
    searched(drawn, 40)
    assert area(search.front) > area(drawn.front)
