from __future__ import annotations

import errno
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest

from search import recorder as module
from search.recorder import Recorder
from search.records.events import TrialConfig
from search.records.files import read_front, read_trials
from search.records.front import build_front
from search.records.ledger import Ledger
from search.report.progress import Progress
from search.sweep.spec import Sweep, SweepFailedError
from search.sweep.toml import load_sweep
from tests.search.recorded import DENSE, Clock, result, trial_of


class Logged:
    """What a recorder asks a tracker or a searcher for."""

    trouble = ""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def sweep(sweep_file: Path) -> Sweep:
    sweep = load_sweep(sweep_file, ["constraints.max_drop=20.0"])
    sweep.directory.mkdir(parents=True)
    return sweep


def make(sweep: Sweep, clock: Clock | None = None) -> Recorder:
    progress = Progress(io.StringIO(), trials=9, epochs=1)
    calls: Any = [Logged(), Logged()]  # of the tracker and of the searcher
    return Recorder(Ledger(sweep), calls[0], progress, calls[1], clock or Clock())


def fails(trial: Any, said: str) -> None:
    """Let a trial fail once more, as Ray writes it down."""
    folder = Path(tempfile.mkdtemp()) if trial.error_file is None else trial.error_file.parent
    trial.error_file = folder / "error.txt"
    with trial.error_file.open("a") as file:
        file.write(f"Failure # 1 (occurred at 2026-11-25)\n{said}\n")


def start(recorder: Recorder, trial: Any) -> None:
    recorder.ledger.ask(TrialConfig.from_json(trial.config))  # as the searcher does
    recorder.on_trial_start(0, [], trial)


def run(recorder: Recorder, trial: Any, top1: float, status: str = "finished") -> None:
    start(recorder, trial)
    recorder.on_trial_result(0, [], trial, result(trial, top1, status=status))
    recorder.on_trial_complete(0, [], trial)


def test_a_trial_from_start_to_end(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    trial = trial_of("0001")
    start(recorder, trial)
    recorder.on_trial_result(0, [], trial, result(trial, 61.0, 0, "running"))
    assert recorder.ledger.records["0001"].status == "running"
    recorder.on_trial_result(0, [], trial, result(trial, 70.0, 1))
    recorder.on_trial_complete(0, [], trial)
    dense, ended = read_trials(sweep.directory / "trials.parquet")
    assert (dense.status, dense.methods) == ("dense", "dense")
    assert (ended.status, ended.val_top1, ended.epochs) == ("finished", 70.0, 1)
    assert [h["val_top1"] for h in ended.history] == [61.0, 70.0]
    assert ended.checkpoint == "models/0001/epoch-0001"
    front = read_front(sweep.directory / "front.json")
    assert [m.trial for m in front.members] == ["0001"]
    (shown,) = recorder.tracker.of("show")[-1:]  # type: ignore[attr-defined]
    assert [m.trial for m in shown[0].members] == ["0001"]
    assert not list(sweep.directory.glob(".*"))  # no temporary file is left


def test_epochs_that_are_reported_again_count_once(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    trial = trial_of("0001")
    start(recorder, trial)
    for epochs in ((0, 1), (0, 1, 2)):  # its actor died, and it starts anew
        for epoch in epochs:
            recorder.on_trial_result(0, [], trial, result(trial, 60.0 + epoch, epoch, "running"))
    recorder.on_trial_complete(0, [], trial)
    record = recorder.ledger.records["0001"]
    assert [h["epoch"] for h in record.history] == [0, 1, 2]
    assert (record.val_top1, record.epochs) == (62.0, 2)
    events = [e["result"] for e in recorder.ledger.journal.read() if e["event"] == "epoch"]
    assert [(e["trial"], e["epoch"]) for e in events[1:]] == [("0001", n) for n in range(3)]


def test_what_a_scheduler_ends_is_stopped_and_never_on_the_front(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    run(recorder, trial_of("0001"), 79.0, "running")
    failed = trial_of("0002")
    recorder.ledger.ask(TrialConfig.from_json(failed.config))
    fails(failed, "ValueError: two lines\n  the second\n")
    recorder.retries.most = 0
    recorder.on_trial_error(0, [], failed)
    assert [r.status for r in recorder.ledger.records.values()] == ["dense", "stopped", "failed"]
    assert recorder.ledger.records["0002"].reason == "the second"
    assert read_front(sweep.directory / "front.json").members == ()


def test_a_recorder_goes_on_where_a_killed_driver_was(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    run(recorder, trial_of("0001"), 70.0)
    running = trial_of("0002", 0.6)
    start(recorder, running)
    recorder.on_trial_result(0, [], running, result(running, 65.0, 0, "running"))
    with (sweep.directory / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "epoch", "resu')

    again = make(sweep)
    assert again.ledger.records == recorder.ledger.records
    assert (again.ledger.ended, again.progress.ended) == (2, 2)
    again.on_trial_start(0, [], running)  # the trial repeats what it had reported
    for epoch, top1, status in ((0, 65.0, "running"), (1, 75.0, "finished")):
        again.on_trial_result(0, [], running, result(running, top1, epoch, status))
    again.on_trial_complete(0, [], running)
    assert [h["val_top1"] for h in again.ledger.records["0002"].history] == [65.0, 75.0]
    assert make(sweep).ledger.records == again.ledger.records
    assert [r.status for r in again.ledger.records.values()] == ["dense", "finished", "finished"]


def test_every_end_is_on_disk_at_once(sweep: Sweep) -> None:
    """Tables may lag behind; the ledger may not."""
    recorder = make(sweep)
    recorder.due = float("inf")
    for trial, top1 in ((DENSE, 80.0), (trial_of("0001"), 70.0), (trial_of("0002"), 71.0)):
        run(recorder, trial, top1)
        assert Ledger(sweep).records == recorder.ledger.records
    assert not (sweep.directory / "trials.parquet").exists()
    recorder.on_experiment_end([])
    assert len(read_trials(sweep.directory / "trials.parquet")) == 3
    assert [m.trial for m in read_front(sweep.directory / "front.json").members] == ["0002"]
    assert recorder.tracker.calls[-1] == ("wait", module.PATIENCE_S)  # type: ignore[attr-defined]


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
    assert records == sorted(recorder.ledger.records.values(), key=lambda r: r.trial)
    whole = build_front(records, sweep.cost)
    written = read_front(sweep.directory / "front.json")
    assert written.hypervolume == whole.hypervolume
    assert [m.trial for m in written.members] == [m.trial for m in whole.members]
    assert recorder.tracker.of("show")[-1] == (whole, records)  # type: ignore[attr-defined]


def test_what_ended_before_the_dense_model_is_judged_when_that_is_there(sweep: Sweep) -> None:
    recorder = make(sweep)
    start(recorder, DENSE)
    run(recorder, trial_of("0001", 0.4), 59.0)
    run(recorder, trial_of("0002", 0.5), 58.0)  # which the first would keep off the front
    run(recorder, trial_of("0003", 0.6), 61.0)
    assert recorder.ledger.records["0001"].violates == ""
    recorder.on_trial_result(0, [], DENSE, result(DENSE, 80.0))
    recorder.on_trial_complete(0, [], DENSE)
    assert recorder.ledger.records["0001"].violates == "drop 21 beyond max_drop = 20"
    assert recorder.ledger.records["0003"].violates == ""
    assert recorder.ledger.growing.front is not None
    assert [m.trial for m in recorder.ledger.growing.front.members] == ["0003"]
    assert recorder.ledger.ended == 4
    assert Ledger(sweep).records == recorder.ledger.records


def test_confirmed_plans_are_compared_by_their_means(sweep: Sweep) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    for name, top1 in (("0001", 75.0), ("0002", 74.0), ("0003", 70.0)):
        run(recorder, trial_of(name), top1)
    for name, of, top1 in (("0004", "0001", 71.0), ("0005", "0002", 73.0), ("0006", "0002", 72.0)):
        run(recorder, trial_of(name, origin="confirm", of=of), top1)
    front = recorder.ledger.growing.front
    assert front == build_front(list(recorder.ledger.records.values()), sweep.cost)
    assert front is not None
    assert [(m.trial, m.val_top1, m.runs) for m in front.members] == [("0002", 72.5, 3)]


@pytest.mark.parametrize("at", ["epoch", "ended", "tables"])
def test_a_full_disk_stops_the_sweep_and_loses_nothing(
    at: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = make(sweep)
    run(recorder, DENSE, 80.0)
    trial = trial_of("0001")
    start(recorder, trial)
    recorder.on_trial_result(0, [], trial, result(trial, 60.0, 0, "running"))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        if at == "tables":
            disk.setattr(module, "write_trials", full)
        if at == "epoch":
            disk.setattr("search.records.journal.Journal.append", full)
        recorder.on_trial_result(0, [], trial, result(trial, 70.0, 1))
        if at == "ended":
            disk.setattr("search.records.journal.Journal.append", full)
        recorder.on_trial_complete(0, [], trial)  # Ray would only log what it raises
    before = (sweep.directory / "ledger.jsonl").read_bytes()
    with pytest.raises(SweepFailedError, match="cannot be written to: No space left on device"):
        recorder.on_step_end(0, [])
    recorder.on_experiment_end([])  # space is back, but what is in between is missing
    assert (sweep.directory / "ledger.jsonl").read_bytes() == before
    last = Ledger(sweep).records["0001"]
    expected = {"epoch": ("running", 0), "ended": ("finished", 1), "tables": ("finished", 1)}[at]
    assert (last.status, last.epochs) == expected


def test_a_trial_whose_process_failed_is_handed_out_again_or_given_up(sweep: Sweep) -> None:
    recorder, trial = make(sweep), trial_of("0001")
    calls: Any = recorder.searcher
    start(recorder, trial)
    for again in (1, 2):
        fails(trial, "the actor died")
        recorder.on_trial_error(0, [], trial)
        assert calls.of("hand_out_again") == [("ray-0001", 1)] * again
    recorder.on_trial_result(0, [], trial, result(trial, 60.0, 0, "running"))
    for again in (3, 4):  # an epoch lies between
        fails(trial, "the actor died")
        recorder.on_trial_error(0, [], trial)
        assert len(calls.of("hand_out_again")) == again
    recorder.on_trial_result(0, [], trial, result(trial, 60.0, 0, "running"))  # repeated: none
    assert recorder.ledger.records["0001"].status == "running"
    fails(trial, "the actor died at last")
    recorder.on_trial_error(0, [], trial)
    assert calls.of("give_up") == [("ray-0001",)]
    assert recorder.ledger.records["0001"].reason == "the actor died at last"
    shown = recorder.progress.stream.getvalue()  # type: ignore[attr-defined]
    assert shown.count("goes on elsewhere: the actor died\n") == 4


def test_a_trial_whose_node_ran_out_of_memory_goes_on_in_parts(sweep: Sweep) -> None:
    recorder, trial = make(sweep), trial_of("0001")
    start(recorder, trial)
    fails(trial, "Task was killed ... set the environment variable `RAY_memory_usage_threshold`")
    recorder.on_trial_error(0, [], trial)
    trial.config["parts"] = 2  # as the searcher hands it out
    fails(trial, "Task was killed ... set the environment variable `RAY_memory_usage_threshold`")
    recorder.on_trial_error(0, [], trial)
    calls: Any = recorder.searcher
    assert calls.of("hand_out_again") == [("ray-0001", 2), ("ray-0001", 4)]
    shown = recorder.progress.stream.getvalue()  # type: ignore[attr-defined]
    assert "its node ran out of memory; batches in 4 parts" in shown


def test_a_trial_that_cannot_be_saved_stops_the_sweep(sweep: Sweep) -> None:
    recorder, trial = make(sweep), trial_of("0001")
    start(recorder, trial)
    fails(trial, "Traceback\nsearch.sweep.SweepFailedError: /x cannot be written to: No space")
    recorder.on_trial_error(0, [], trial)
    with pytest.raises(SweepFailedError, match=r"^/x cannot be written to: No space$"):
        recorder.on_step_end(0, [])
    assert recorder.ledger.records["0001"].status == "running"  # it goes on another time


def test_a_trial_that_hung_says_where(sweep: Sweep) -> None:
    recorder, trial = make(sweep), trial_of("0001")
    start(recorder, trial)
    hung = sweep.directory / "models" / "0001" / "hung.txt"
    hung.parent.mkdir(parents=True)
    hung.touch()
    fails(trial, "the actor died")
    recorder.on_trial_error(0, [], trial)
    recorder.retries.most = 0
    hung.write_text("Timeout (6:00:00)!")
    recorder.on_trial_error(0, [], trial)
    assert recorder.ledger.records["0001"].reason == (
        "timed out: an epoch took longer than max_epoch_hours = 6; "
        "models/0001/hung.txt says where it hung"
    )
