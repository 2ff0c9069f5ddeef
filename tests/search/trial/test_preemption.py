from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from search.trial import preemption
from search.trial.preemption import Notice, node_is_drained
from tests.processes import ROOT


def test_sigterm_is_noticed_only_where_it_is_heeded() -> None:
    told, before = Notice(), signal.getsignal(signal.SIGTERM)
    with told.heeded():
        assert not told.given()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.given()
    assert signal.getsignal(signal.SIGTERM) == before
    assert told.given()


def test_elsewhere_sigterm_ends_a_process() -> None:
    program = """
import os, signal
from search.trial.preemption import Notice
told = Notice()
with told.heeded():
    os.kill(os.getpid(), signal.SIGTERM)
print("heeded", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("not ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "heeded\n"
    assert done.returncode == -signal.SIGTERM


def test_threads_other_than_the_first_get_no_signals_and_no_errors() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Notice().heeded():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_the_node_is_asked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, drained = [], False

    def ask() -> bool:
        asked.append(1)
        return drained

    monkeypatch.setattr(preemption, "node_is_drained", ask)
    told = Notice()
    for _ in range(100):
        assert not told.given()
    assert len(asked) == 0
    monkeypatch.setattr(preemption, "LOOK_S", 0.0)
    assert not told.given()
    drained = True
    assert told.given()
    drained = False
    assert told.given()  # for good


@pytest.mark.usefixtures("ray_session")
def test_a_node_that_stays_is_not_drained() -> None:
    assert not node_is_drained()
