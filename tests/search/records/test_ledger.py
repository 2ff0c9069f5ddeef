from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from search.records.events import METRICS, EpochResult, TrialConfig
from search.records.journal import Journal
from search.records.ledger import Ledger, new_record
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from tests.search.recorded import DENSE, Clock, trial_of
from tests.search.recorded import result as report


def config(trial: Any) -> TrialConfig:
    return TrialConfig.from_json(trial.config)


def result(*args: Any) -> EpochResult:
    return EpochResult.from_report(report(*args))


@pytest.fixture
def sweep(sweep_file: Path) -> Sweep:
    sweep = load_sweep(sweep_file)
    sweep.directory.mkdir(parents=True)
    return sweep


def events(sweep: Sweep) -> list[dict[str, Any]]:
    return Journal(sweep.directory / "ledger.jsonl").read()


def test_events_are_in_the_file_as_they_happen(sweep: Sweep) -> None:
    clock = Clock()
    ledger = Ledger(sweep, clock)
    assert (ledger.past, ledger.seconds) == ([], 0.0)
    ledger.begin()
    clock.now = 1.5
    ledger.add_once("learned", runs=[])
    ledger.ask(config(DENSE))
    assert ledger.report(EpochResult.from_report({**report(DENSE, 80.0), "of Ray": "nothing"}))
    assert not ledger.report(result(DENSE, 81.0))  # known
    ledger.end("0000", "dense", "")
    ledger.stop("6 trials")
    kinds = ["began", "learned", "asked", "epoch", "ended", "stopped"]
    assert [event["event"] for event in events(sweep)] == kinds
    assert [event["time"] for event in events(sweep)] == [0, *[1500] * 5]
    _, _, asked, epoch, ended, stopped = events(sweep)
    assert asked["config"] == DENSE.config
    assert epoch["result"]["val_top1"] == 80.0
    assert epoch["result"] == result(DENSE, 80.0).to_json()
    assert {"of Ray", "done"}.isdisjoint(epoch["result"])
    assert (ended["count"], ended["hypervolume"], ended["front_size"]) == (1, 0.0, 0)
    assert stopped["why"] == "6 trials"


def test_what_a_sweep_has_once_is_not_added_again(sweep: Sweep) -> None:
    for _ in range(2):
        ledger = Ledger(sweep)
        ledger.begin()
        ledger.add_once("elastic", run={"epochs": 2})
    assert [event["event"] for event in events(sweep)] == ["began", "elastic", "began"]


def test_seconds_between_drivers_do_not_count(sweep: Sweep) -> None:
    clock, seconds = Clock(), []
    for start, last in ((100.0, 130.0), (1000.0, 1007.0), (5000.0, 5000.0)):
        ledger = Ledger(sweep, clock)
        seconds.append(ledger.seconds)
        clock.now = start
        ledger.begin()
        clock.now = last
        ledger.stop("")
    assert [*seconds, Ledger(sweep).seconds] == [0.0, 30.0, 37.0, 37.0]


def test_a_record_knows_what_the_sweep_had_spent(sweep: Sweep) -> None:
    ledger = Ledger(sweep)
    ledger.add_once("classes", names=["cat", "dog"])
    for trial in (DENSE, trial_of("0001"), trial_of("0002")):
        ledger.ask(config(trial))
    ledger.report(result(DENSE, 80.0))  # measured, not tuned
    ledger.end("0000", "dense", "")
    for epoch in range(3):
        for name in ("0001", "0002"):
            ledger.report(result(trial_of(name), 60.0, epoch, "running"))
    ledger.end("0001", "finished", "")
    ledger.report(result(trial_of("0002"), 61.0, 3))
    ledger.end("0002", "finished", "")
    for one in (ledger, Ledger(sweep)):
        assert [one.records[name].spent for name in ("0000", "0001", "0002")] == [0, 4, 5]
        assert one.records["0002"].by_class == [61.0, None]
        assert one.growing.front is not None
        assert one.growing.front.classes == ("cat", "dog")


def test_a_result_that_is_not_finite_is_kept_as_it_was(sweep: Sweep) -> None:
    ledger = Ledger(sweep)
    ledger.ask(config(trial_of("0001")))
    failed = result(trial_of("0001"), 12.0, 1, "failed")
    ledger.report(dataclasses.replace(failed, train_loss=math.nan))
    again = Ledger(sweep)
    (epoch,) = again.records["0001"].history
    assert "train_loss" not in epoch
    assert set(epoch) == {"epoch", *METRICS} - {"train_loss"}
    assert math.isnan(again.past[-1]["result"]["train_loss"])


def test_a_ledger_without_its_beginning_is_refused(sweep: Sweep) -> None:
    ledger = Ledger(sweep)
    ledger.ask(config(DENSE))
    ledger.report(result(DENSE, 80.0))
    path = sweep.directory / "ledger.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match=r"ledger\.jsonl lacks what came before .*'0000'"):
        Ledger(sweep)


def test_a_record_says_what_a_person_tells_it_apart_by() -> None:
    confirm = new_record(config(trial_of("0007", 0.25, origin="confirm", of="0003")))
    assert confirm.name == "0007 magnitude 0.25x (confirm 0003)"
    assert (confirm.methods, confirm.origin, confirm.of) == ("magnitude", "confirm", "0003")
    assert confirm.plan == json.loads(trial_of("0007").config["plan"])
    assert new_record(config(DENSE)).name == "0000 dense"
