from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search import recorder as module
from search.progress import Progress
from search.recorder import Recorder
from search.results import build_front, read_front, read_trials
from search.sweep import Sweep, SweepFailedError
from search.sweep_file import load_sweep

PLAN = {"steps": [{"method": "magnitude", "options": {}, "thresholds": {"blocks.0.mlp.fc1": 0.5}}]}


class Logged:
    """What a recorder asks a tracker for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sweep(sweep_file: Path) -> Sweep:
    sweep = load_sweep(sweep_file, ["constraints.max_drop=20.0"])
    sweep.directory.mkdir(parents=True)
    return sweep


def make(sweep: Sweep, *, resuming: bool = False, clock: Clock | None = None) -> Recorder:
    progress = Progress(io.StringIO(), trials=9, epochs=1)
    return Recorder(sweep, Logged(), progress, resuming=resuming, clock=clock or Clock())  # type: ignore[arg-type]


def trial_of(name: str, ratio: float = 0.5, origin: str = "search", of: str = "") -> Any:
    config = {
        "trial": name,
        "origin": origin,
        "epochs": 1,
        "plan": json.dumps({"steps": []} if origin == "dense" else PLAN),
        "cost_ratio": ratio,
        "parameters": {"budget": ratio},
        "of": of,
        "seed": 0,
    }
    return SimpleNamespace(config=config)


def result(trial: Any, top1: float, epoch: int = 0, status: str = "finished") -> dict[str, Any]:
    ratio = trial.config["cost_ratio"]
    return {
        **dict.fromkeys(module.METRICS, 1.0),
        "trial": trial.config["trial"],
        "epoch": epoch,
        "status": status,
        "reason": "",
        "val_top1": top1,
        "gmacs": ratio,
        "effective_gmacs": ratio,
        "params": 1000,
        "shape": json.dumps({"blocks": []}),
    }


def run(recorder: Recorder, trial: Any, top1: float, status: str = "finished") -> None:
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_result(0, [], trial, result(trial, top1, status=status))
    recorder.on_trial_complete(0, [], trial)


DENSE = trial_of("0000", 1.0, "dense")


def restored(sweep: Sweep, snapshot: bytes) -> Recorder:
    again = make(sweep, resuming=True)
    again.set_state(pickle.loads(snapshot))
    again.setup()
    return again


def test_a_trial_from_start_to_end(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    trial = trial_of("0001")
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_result(0, [], trial, result(trial, 61.0, 0, "running"))
    assert recorder.records["0001"].status == "running"
    recorder.on_trial_result(0, [], trial, result(trial, 70.0, 1))
    recorder.on_trial_complete(0, [], trial)
    dense, ended = read_trials(sweep.directory / "trials.parquet")
    assert (dense.status, dense.methods) == ("dense", "dense")
    assert (ended.status, ended.val_top1, ended.epochs) == ("finished", 70.0, 1)
    assert [h["val_top1"] for h in ended.history] == [61.0, 70.0]
    assert ended.checkpoint == "models/0001/epoch-0001"
    front = read_front(sweep.directory / "front.json")
    assert [m.trial for m in front.members] == ["0001"]
    assert [call[1] for call in recorder.tracker.of("front_grew")] == [1, 2]  # type: ignore[attr-defined]
    assert not list(sweep.directory.glob(".*"))  # no temporary file is left


def test_epochs_that_are_reported_again_count_once(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    trial = trial_of("0001")
    recorder.on_trial_start(0, [], trial)
    for epochs in ((0, 1), (0, 1, 2)):  # its actor died, and it starts anew
        for epoch in epochs:
            recorder.on_trial_result(0, [], trial, result(trial, 60.0 + epoch, epoch, "running"))
    recorder.on_trial_complete(0, [], trial)
    record = recorder.records["0001"]
    assert [h["epoch"] for h in record.history] == [0, 1, 2]
    assert (record.val_top1, record.epochs) == (62.0, 2)
    logged = [call[:2] for call in recorder.tracker.of("epoch") if call[0] == "0001"]  # type: ignore[attr-defined]
    assert logged == [("0001", epoch) for epoch in range(3)]


def test_what_a_scheduler_ends_is_stopped_and_never_on_the_front(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    run(recorder, trial_of("0001"), 79.0, "running")
    failed = trial_of("0002")
    failed.get_pickled_error = lambda: ValueError("two lines\n  the second")
    recorder.on_trial_error(0, [], failed)
    assert [r.status for r in recorder.records.values()] == ["dense", "stopped", "failed"]
    assert recorder.records["0002"].reason == "the second"
    assert read_front(sweep.directory / "front.json").members == ()


def test_a_killed_driver_goes_on_from_the_snapshot(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    run(recorder, trial_of("0001"), 70.0)
    running = trial_of("0002", 0.6)
    recorder.on_trial_start(0, [], running)
    recorder.on_trial_result(0, [], running, result(running, 65.0, 0, "running"))
    snapshot, before = pickle.dumps(recorder.get_state()), dict(recorder.records)
    # Later than the snapshot: another ends, the one that runs ends, and a line is cut short.
    run(recorder, trial_of("0003", 0.4), 72.0)
    recorder.on_trial_result(0, [], running, result(running, 75.0, 1))
    recorder.on_trial_complete(0, [], running)
    with (sweep.directory / "trials.jsonl").open("ab") as file:
        file.write(b'{"trial": "0004", "na')

    again = restored(sweep, snapshot)
    assert again.records == before
    assert (again.ended, again.progress.ended) == (2, 2)
    assert again.growing.front is not None
    assert [m.trial for m in again.growing.front.members] == ["0001"]
    # What was lost runs again, with another plan and another end.
    run(again, trial_of("0003", 0.7), 71.0)
    again.on_trial_result(0, [], running, result(running, 60.0, 1))
    again.on_trial_complete(0, [], running)
    last = restored(sweep, pickle.dumps(again.get_state()))
    assert last.records == again.records
    assert (last.records["0003"].cost_ratio, last.records["0002"].val_top1) == (0.7, 60.0)
    assert last.ended == 4


def test_a_snapshot_does_not_grow_with_the_trials_that_ended(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    sizes = []
    for number in range(1, 60):
        run(recorder, trial_of(f"{number:04d}"), 70.0)
        sizes.append(len(pickle.dumps(recorder.get_state())))
    assert max(sizes) - min(sizes) < 16  # a number gets longer
    assert recorder.tracker.calls[-1] == ("wait",)  # type: ignore[attr-defined]


def test_every_record_is_on_disk_as_soon_as_its_trial_ended(sweep: Sweep) -> None:
    """Tables may lag behind; the journal may not."""
    recorder = make(sweep)
    recorder.due = float("inf")
    for trial, top1 in ((DENSE, 80.0), (trial_of("0001"), 70.0), (trial_of("0002"), 71.0)):
        run(recorder, trial, top1)
        lines = (sweep.directory / "trials.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == vars(recorder.records[trial.config["trial"]])
    assert not (sweep.directory / "trials.parquet").exists()
    recorder.on_experiment_end([])
    assert len(read_trials(sweep.directory / "trials.parquet")) == 3
    assert [m.trial for m in read_front(sweep.directory / "front.json").members] == ["0002"]
    assert recorder.tracker.calls[-1] == ("wait",)  # type: ignore[attr-defined]


def test_tables_take_a_twentieth_of_the_time(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = Clock(), []

    def slow(path: Path, records: list[Any]) -> None:
        written.append((clock.now, len(records)))
        clock.now += 2.0

    monkeypatch.setattr(module, "write_trials", slow)
    recorder = make(sweep, clock=clock)
    run(recorder, DENSE, 80.0)
    for number in range(1, 201):
        clock.now += 1.0
        run(recorder, trial_of(f"{number:04d}"), 70.0)
    assert [now for now, _ in written] == [0.0, 40.0, 80.0, 120.0, 160.0, 200.0]
    assert written[1] == (40.0, 39)
    # The last one's turn comes although nothing ends any more, and then there is nothing to do.
    for _ in range(100):
        clock.now += 1.0
        recorder.on_step_end(0, [])
    recorder.on_experiment_end([])
    assert [now for now, _ in written[6:]] == [240.0]
    assert written[6][1] == 201


def test_the_tables_and_the_front_hold_all_trials_at_the_end(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    for number in range(1, 30):
        run(recorder, trial_of(f"{number:04d}", 0.3 + number * 7 % 13 / 20), 60.0 + number * 5 % 17)
    recorder.on_experiment_end([])
    records = read_trials(sweep.directory / "trials.parquet")
    assert records == sorted(recorder.records.values(), key=lambda r: r.trial)
    whole = build_front(records, sweep.cost)
    written = read_front(sweep.directory / "front.json")
    assert written.hypervolume == whole.hypervolume
    assert [m.trial for m in written.members] == [m.trial for m in whole.members]
    assert recorder.tracker.of("update_front")[-1] == (whole, records)  # type: ignore[attr-defined]


def test_what_ended_before_the_dense_model_is_judged_when_that_is_there(sweep: Sweep) -> None:
    recorder = make(sweep)
    recorder.on_trial_start(0, [], DENSE)
    run(recorder, trial_of("0001", 0.4), 59.0)
    run(recorder, trial_of("0002", 0.5), 58.0)  # which the first would keep off the front
    run(recorder, trial_of("0003", 0.6), 61.0)
    assert recorder.records["0001"].violates == ""
    recorder.on_trial_result(0, [], DENSE, result(DENSE, 80.0))
    recorder.on_trial_complete(0, [], DENSE)
    assert recorder.records["0001"].violates == "drop 21 beyond max_drop = 20"
    assert recorder.records["0003"].violates == ""
    assert recorder.growing.front is not None
    assert [m.trial for m in recorder.growing.front.members] == ["0003"]
    assert recorder.ended == 4
    assert restored(sweep, pickle.dumps(recorder.get_state())).records == recorder.records


def test_confirmed_plans_are_compared_by_their_means(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    for name, top1 in (("0001", 75.0), ("0002", 74.0), ("0003", 70.0)):
        run(recorder, trial_of(name), top1)
    for name, of, top1 in (("0004", "0001", 71.0), ("0005", "0002", 73.0), ("0006", "0002", 72.0)):
        run(recorder, trial_of(name, origin="confirm", of=of), top1)
    front = recorder.growing.front
    assert front == build_front(list(recorder.records.values()), sweep.cost)
    assert front is not None
    assert [(m.trial, m.val_top1, m.runs) for m in front.members] == [("0002", 72.5, 3)]


def test_a_sweep_that_begins_anew_forgets_an_earlier_driver(sweep: Sweep) -> None:
    """One that was killed before Ray's first snapshot."""
    run(make(sweep), DENSE, 80.0)
    recorder = make(sweep)
    recorder.setup()
    run(recorder, DENSE, 79.0)
    assert restored(sweep, pickle.dumps(recorder.get_state())).records["0000"].val_top1 == 79.0
    assert len((sweep.directory / "trials.jsonl").read_text().splitlines()) == 1


def test_a_state_that_cannot_be_read_is_refused(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    state = recorder.get_state()
    os.truncate(sweep.directory / "trials.jsonl", 10)
    again = make(sweep, resuming=True)
    with pytest.raises(ValueError, match="are needed"):
        again.set_state(state)
    with pytest.raises(SweepFailedError, match="move the directory away"):  # Ray only logs it
        again.setup()
