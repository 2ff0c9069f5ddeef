from __future__ import annotations

import math

import optuna
import pytest
from optuna.trial import TrialState

from pruners import Plan
from search.searcher import PlanSearcher, make_sampler
from search.space import Space
from search.sweep import load_sweep


@pytest.fixture
def searcher(sweep_file, tiny) -> PlanSearcher:
    sweep = load_sweep(sweep_file, ["trials=8"])
    return PlanSearcher(sweep, Space(sweep, tiny().shape()))


def result(config: dict, top1: float = 50.0, status: str = "finished") -> dict:
    return {"status": status, "val_top1": top1, "cost_ratio": config["cost_ratio"]}


def test_the_dense_model_and_the_ladder_come_first(searcher: PlanSearcher) -> None:
    configs = [searcher.suggest(f"t{i}") for i in range(8)]
    assert [c["origin"] for c in configs] == ["dense", "ladder", "ladder", *["search"] * 5]
    assert [c["trial"] for c in configs] == [f"{i:04d}" for i in range(8)]
    assert (configs[0]["epochs"], configs[0]["plan"]) == (0, {"steps": []})
    assert all(0.5 <= c["cost_ratio"] <= 0.9 for c in configs[1:])
    assert searcher.suggest("t9") == "FINISHED"


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ({}, TrialState.COMPLETE),
        ({"status": "stopped"}, TrialState.PRUNED),
        ({"status": "failed"}, TrialState.FAIL),
        ({"top1": math.nan}, TrialState.FAIL),
        ({"top1": math.inf}, TrialState.FAIL),
    ],
)
def test_every_trial_is_told_and_none_stays_running(
    told: dict, state: TrialState, searcher
) -> None:
    configs = {f"t{i}": searcher.suggest(f"t{i}") for i in range(4)}
    searcher.on_trial_complete("t2", result(configs["t2"], **told))
    for name in ("t0", "t1", "t3"):
        searcher.on_trial_complete(name, result(configs[name]))
    states = [t.state for t in searcher.study.trials if t.state != TrialState.WAITING]
    assert sorted(states) == sorted([TrialState.COMPLETE, state, TrialState.COMPLETE])
    if state == TrialState.COMPLETE:
        assert searcher.study.trials[1].values == [50.0, configs["t2"]["cost_ratio"]]


def test_an_error_or_no_result_is_a_failure(searcher: PlanSearcher) -> None:
    for name in ("t0", "t1", "t2"):
        searcher.suggest(name)
    searcher.on_trial_complete("t1", None, error=True)
    searcher.on_trial_complete("t2", None)
    searcher.on_trial_complete("t2", None)  # told twice
    assert [t.state for t in searcher.study.trials[:2]] == [TrialState.FAIL] * 2


def test_saved_state_goes_on_the_same_way(searcher, sweep_file, tiny, tmp_path) -> None:
    configs = {f"t{i}": searcher.suggest(f"t{i}") for i in range(5)}
    for name in ("t0", "t1", "t2", "t3"):
        searcher.on_trial_complete(name, result(configs[name], top1=40.0 + len(name)))
    searcher.save(str(tmp_path / "state"))
    again = PlanSearcher(searcher.sweep, searcher.space)
    again.restore(str(tmp_path / "state"))
    for one in (searcher, again):
        one.on_trial_complete("t4", result(configs["t4"]))
    assert searcher.suggest("t5") == again.suggest("t5")
    running = [t for t in again.study.trials if t.state == TrialState.RUNNING]
    assert len(running) == 1


def test_the_same_seed_proposes_the_same_plans(sweep_file, tiny) -> None:
    sequences = []
    for seed in (3, 3, 4):
        sweep = load_sweep(sweep_file, [f"seed={seed}", "trials=8"])
        searcher = PlanSearcher(sweep, Space(sweep, tiny().shape()))
        sequences.append([searcher.suggest(f"t{i}")["plan"] for i in range(8)])
    assert sequences[0] == sequences[1] != sequences[2]
    assert Plan.from_json(sequences[0][5]).steps


def test_the_study_is_copied_for_the_dashboard(searcher: PlanSearcher, tmp_path) -> None:
    configs = {f"t{i}": searcher.suggest(f"t{i}") for i in range(4)}
    for name in ("t0", "t1", "t2"):
        searcher.on_trial_complete(name, result(configs[name]))
    searcher.export_study(tmp_path / "study.db")
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [t.values for t in study.trials] == [t.values for t in searcher.study.trials[:2]]
    assert all(t.state != TrialState.RUNNING for t in study.trials)


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random"])
def test_samplers_propose_in_two_objectives(name: str, sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, [f'sampler="{name}"', "trials=16", "ladder=0"])
    searcher = PlanSearcher(sweep, Space(sweep, tiny().shape()))
    for i in range(16):
        config = searcher.suggest(f"t{i}")
        searcher.on_trial_complete(f"t{i}", result(config, top1=float(i)))
    assert sum(t.state == TrialState.COMPLETE for t in searcher.study.trials) == 15
    assert make_sampler(name, 0).__class__ is searcher.study.sampler.__class__
