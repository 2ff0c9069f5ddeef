"""What happens to a trial's process: killed, told to end, out of memory, hung, not finite."""

from __future__ import annotations

import ctypes
import dataclasses
import random
import signal
import time

import psutil
import pytest

from search.records.files import read_trials
from tests.chaos.faults import Faulty, actors, epochs_of, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def training(faulty: Faulty, name: str) -> bool:
    """Whether a trial of a sweep has reported its first result and not its last."""
    ended = {event["trial"] for event in faulty.events(name, "ended")}
    return any(
        event["result"]["trial"] not in ended
        for event in faulty.events(name, "epoch")
        if event["result"]["trial"] != "0000"
    )


def test_actors_that_are_killed_at_any_moment_change_nothing(faulty: Faulty) -> None:
    name, draw = "killed", random.Random(0)
    driver = faulty.start(name)
    killed, lines = 0, 2
    while driver.poll() is None and killed < 6:
        # A ledger that grows between two kills: who never gets anything done fails at last.
        until(lambda n=lines: driver.poll() is not None or faulty.lines(name) > n, 150)
        time.sleep(draw.random())  # setting up, cutting, training, saving, between trials
        lines = faulty.lines(name)
        for actor in actors():
            actor.send_signal(signal.SIGKILL)
            killed += 1
    faulty.finish(driver)
    assert killed >= 3
    faulty.same(name, "whole")


def test_an_actor_that_is_told_to_end_saves_the_running_epoch(faulty: Faulty) -> None:
    driver = faulty.start("told")
    until(lambda: training(faulty, "told"), 150)
    (actor,) = until(actors)
    time.sleep(0.3)
    actor.send_signal(signal.SIGTERM)
    middle = until(lambda: list(faulty.directory("told").glob("models/*/epoch-*-*")), 30)
    actor.wait(30)
    said = faulty.finish(driver)
    assert "goes on elsewhere: " in said
    assert "told to end" in said
    assert middle[0].name.split("-")[2] != "000000"
    faulty.same("told", "whole")


def test_a_trial_that_runs_out_of_memory_takes_smaller_parts(faulty: Faulty) -> None:
    sets = ["data.batch_size=32", "trials=3", "halving=false", "epochs=3"]
    faulty.run("roomy", *sets)
    hooked = ("tests.chaos.driver", "short_of_memory")
    dataclasses.replace(faulty, driver=hooked).run("tight", *sets)
    faulty.counts("tight")
    one, other = (epochs_of(faulty.directory(name)) for name in ("tight", "roomy"))
    assert [r["plan"] for r in one.values()] == [r["plan"] for r in other.values()]
    assert {r["status"] for r in one.values()} == {"dense", "finished"}
    for ours, theirs in zip(one.values(), other.values(), strict=True):
        assert ours["history"][:2] == theirs["history"][:2]
        losses = [[epoch[2] for epoch in r["history"]] for r in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_trial_whose_node_is_full_takes_smaller_parts(faulty: Faulty) -> None:
    """Ray's memory monitor ends its process, on a Ray that calls the node full early."""
    folder = faulty.sweep.parent / "full"
    folder.mkdir()
    memory = psutil.virtual_memory()  # tests beside this one take some of it meanwhile
    full = (memory.total - memory.available + 8e9) / memory.total
    limits = {"RAY_memory_usage_threshold": f"{full:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    own = {**faulty.environment, **limits, "GPU_NOTES": str(folder), "RAY_ADDRESS": "local"}
    hooked = ("tests.chaos.driver", "fill_the_node")
    one = dataclasses.replace(faulty, driver=hooked, environment=own)
    sets = ["data.batch_size=32", "trials=3", "halving=false", "max_failures=9"]
    said = one.run("full", *sets, "epochs=3")
    assert (folder / "filled").exists()
    assert "goes on elsewhere: its node ran out of memory; batches in 2 parts" in said
    assert {r["status"] for r in epochs_of(faulty.directory("full")).values()} == {
        "dense",
        "finished",
    }
    faulty.counts("full")


def freeze(process: psutil.Process) -> None:
    """Stop the first thread of a process, as if it waited for a disk that does not answer."""
    attach = 16  # PTRACE_ATTACH takes a thread, and stops it
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(attach, process.pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def test_a_trial_that_hangs_is_timed_out_and_the_sweep_goes_on(faulty: Faulty) -> None:
    sets = ["trials=3", "halving=false", "max_failures=1"]
    driver = faulty.start("hung", *sets, f"max_epoch_hours={10 / 3600}")
    until(lambda: training(faulty, "hung"), 150)
    for _ in range(2):
        (actor,) = until(lambda: actors("ray::_Inner.train"))  # no longer importing
        freeze(actor)
        actor.wait(60)
    said = faulty.finish(driver)
    records = read_trials(faulty.directory("hung") / "trials.parquet")
    assert [r.status for r in records] == ["dense", "failed", "finished"]
    reason = "timed out: an epoch took longer than max_epoch_hours = 0.00277778"
    assert records[1].reason.startswith(reason)
    assert f"goes on elsewhere: {reason}" in said
    assert "train" in (faulty.directory("hung") / "models" / "0001" / "hung.txt").read_text()
    faulty.counts("hung")


def test_a_loss_that_is_not_finite_fails_a_trial_by_name_and_the_sweep_goes_on(
    faulty: Faulty,
) -> None:
    said = faulty.run("infinite", "trials=3", "halving=false", "finetune.lr=1e30")
    records = read_trials(faulty.directory("infinite") / "trials.parquet")
    assert [r.status for r in records] == ["dense", "failed", "failed"]
    assert all("loss is nan" in r.reason for r in records[1:])
    assert "failed, epoch 1: loss is nan" in said
    assert epochs_of(faulty.directory("infinite"))
    faulty.counts("infinite")
