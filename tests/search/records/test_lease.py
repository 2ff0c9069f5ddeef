from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.records import lease
from search.records.lease import Attempt, check_attempt, hold, newest
from search.sweep.spec import SweepError, SweepFailedError
from tests.processes import ROOT, clean_forks

HOLDER = """
import sys, time
from pathlib import Path
from search.records.lease import hold
with hold(Path(sys.argv[1]), print) as lease:
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.05), ("TRUST_S", 0.2), ("WATCH_S", 0.6)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another driver on this machine, which holds the lease."""
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "held\n"
    yield driver
    driver.kill()
    driver.wait()
    driver.stdout.close()


def elsewhere(folder: Path, **changes: object) -> Attempt:
    """A driver on another machine that has the lease."""
    attempt = Attempt(number=1, driver="job-1", host="far", process=("other machine", 7, 1))
    attempt = dataclasses.replace(attempt, **changes)
    (folder / "lease").mkdir(exist_ok=True)
    path = folder / "lease" / f"{attempt.number:06d}.json"
    temporary = path.with_name(".temporary")
    temporary.write_text(json.dumps(dataclasses.asdict(attempt)))
    os.replace(temporary, path)
    return attempt


def test_one_after_the_other_needs_no_waiting(tmp_path: Path) -> None:
    said: list[str] = []
    for number in (1, 2, 3):
        with hold(tmp_path, said.append) as one:
            assert one.attempt.number == number
            one.check()
    assert said == []
    last = newest(tmp_path / "lease")
    assert last is not None
    assert last.released


@pytest.mark.slow
def test_a_second_driver_is_refused_with_the_id_of_the_first(
    tmp_path: Path, other: subprocess.Popen
) -> None:
    with (
        pytest.raises(SweepError, match=rf"attempt 1 \(by hand, .*, process {other.pid}\)"),
        hold(tmp_path, print),
    ):
        pass


@pytest.mark.slow
def test_a_driver_that_died_on_this_machine_is_followed_at_once(
    tmp_path: Path, other: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 60.0)
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it is not waited for yet
    start = time.monotonic()
    with hold(tmp_path, print) as one:
        assert one.attempt.number == 2
    assert time.monotonic() - start < 5.0


def test_another_process_of_its_number_is_not_the_holder(tmp_path: Path) -> None:
    machine, number, start = lease._process(os.getpid())
    elsewhere(tmp_path, process=(machine, number, start - 1))
    with hold(tmp_path, print) as one:
        assert one.attempt.number == 2


def test_a_driver_elsewhere_is_watched_whatever_its_clock(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    end, said = threading.Event(), []

    def beats() -> None:
        count = 0
        while not end.wait(0.1):
            count += 1
            elsewhere(tmp_path, beat=count)

    thread = threading.Thread(target=beats)
    thread.start()
    refused = pytest.raises(SweepError, match=r"attempt 1 \(job-1, far, process 7\)")
    with refused, hold(tmp_path, said.append):
        pass
    end.set()
    thread.join()
    assert len(said) == 1
    assert "watching it for" in said[0]
    with hold(tmp_path, said.append) as one:  # it stands still now
        assert one.attempt.number == 2
    assert len(said) == 2


def test_who_has_lost_the_lease_writes_no_more(tmp_path: Path) -> None:
    with hold(tmp_path, print) as one:
        check_attempt(tmp_path, 1)
        elsewhere(tmp_path, number=2)
        time.sleep(0.5)  # its thread finds out, and does not renew
        with pytest.raises(SweepFailedError, match=r"attempt 2 \(job-1, .* has taken over"):
            one.check()
        with pytest.raises(SweepFailedError, match="attempt 1 writes no more"):
            check_attempt(tmp_path, 1)
        check_attempt(tmp_path, 2)
    last = newest(tmp_path / "lease")
    assert last is not None
    assert (last.number, last.released) == (2, False)  # it is not the first's to release


def test_who_stood_still_looks_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept wakes up in the middle of a driver: its thread has not looked yet."""
    monkeypatch.setattr(lease, "BEAT_S", 60.0)
    now = lease._now()
    with hold(tmp_path, print) as one:
        elsewhere(tmp_path, number=2)
        monkeypatch.setattr(lease, "_now", lambda: now + 3600.0)
        with pytest.raises(SweepFailedError, match="has taken over"):
            one.check()


def test_renewing_keeps_the_lease_valid(tmp_path: Path) -> None:
    with hold(tmp_path, print) as one:
        time.sleep(0.5)
        held = newest(tmp_path / "lease")
        assert held is not None
        assert held.beat >= 3
        one.check()
    assert os.listdir(tmp_path / "lease") == ["000001.json"]  # no temporary file is left


def race(folder: Path, start: multiprocessing.synchronize.Event, results: object) -> None:
    start.wait()
    try:
        with hold(folder, lambda line: None) as one:
            results.put(one.attempt.number)  # type: ignore[attr-defined]
            time.sleep(3.0)
    except SweepError:
        results.put(None)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path) -> None:
    elsewhere(tmp_path, released=True)
    context = clean_forks()
    start, results = context.Event(), context.Queue()
    drivers = [context.Process(target=race, args=(tmp_path, start, results)) for _ in range(8)]
    for driver in drivers:
        driver.start()
    start.set()
    got = [results.get(timeout=30) for _ in drivers]
    assert sorted(got, key=str) == [2, *[None] * 7]
    for driver in drivers:
        driver.terminate()
        driver.join()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    path = tmp_path / "lease" / "000001.json"
    for content in ("{", "[]", "{}", '{"number": 1}'):
        path.write_text(content)
        with pytest.raises(SweepError, match=r"000001\.json is damaged"), hold(tmp_path, print):
            pass


def test_the_job_of_a_driver_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"metadata": {"job_submission_id": "weekly-20261125"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    with hold(tmp_path, print) as one:
        assert one.attempt.driver == "weekly-20261125"
