from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from search.check import check
from search.records.events import EpochResult
from search.sweep.toml import load_sweep
from search.trial.inputs import TrialInputs
from search.trial.trial import Trial
from search.trial.tune_adapter import PlanTrial
from search.trial.workers import OneWorker
from tests.search.trial_events import config_of


def test_an_actor_runs_one_trial_after_another(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    dense, _ = check(sweep)
    inputs = TrialInputs(sweep=sweep, dense=dense, start=dense, directory=sweep.directory)
    step = {"method": "magnitude", "options": {}, "thresholds": {"blocks.0.mlp.fc1": 0.5}}
    configs = [
        config_of("0001", epochs=1, plan=json.dumps({"steps": [step]}), learned=""),
        config_of("0002", epochs=0, origin="dense", cost_ratio=1.0),
    ]
    actor = PlanTrial.__new__(PlanTrial)  # what Ray gives it beside is not looked at
    actor.setup(configs[0].to_json(), inputs)
    reports = [actor.step() for _ in range(2)]
    opened = actor.trial.context
    assert actor.reset_config(configs[1].to_json() | {"parts": 2})
    assert actor.trial.context is opened
    assert actor.trial.config == dataclasses.replace(configs[1], parts=2)
    reports.append(actor.step())
    assert [(r["trial"], r["epoch"], r["done"]) for r in reports] == [
        ("0001", 0, False),
        ("0001", 1, True),
        ("0002", 0, True),
    ]
    again = partial(Trial.first, inputs, workers=OneWorker())
    for report, config in ((reports[0], configs[0]), (reports[2], configs[1])):
        report["of Ray"] = "what Ray adds to it is not saved"
        assert again(config).step() == EpochResult.from_report(report)


def test_inputs_come_with_the_parameters() -> None:
    with pytest.raises(ValueError, match="inputs is None; give TrialInputs"):
        PlanTrial({})
