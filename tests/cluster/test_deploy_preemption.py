"""A worker that is told to stop, as Kubernetes tells it, on Ray itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT, free_port

TRIAL = """
import pathlib, sys, time, ray
from search.trial.preemption import Notice

saved = pathlib.Path(sys.argv[2])
ray.init(address=sys.argv[1])

@ray.remote(resources={"worker": 1})
class Trial:
    def train(self):
        notice = Notice()
        with notice.heeded():
            saved.with_name("running").touch()
            while not notice.given():
                time.sleep(0.1)
            time.sleep(1)
            saved.touch()

ray.get(Trial.remote().train.remote())
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A head and a worker that starts as KubeRay starts it and runs a trial; yields the worker."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
        "PYTHONPATH": str(ROOT),
    }
    address = f"127.0.0.1:{free_port()}"
    folder = tempfile.mkdtemp(prefix="ray")  # not tmp_path: paths of sockets must be short
    ray = Path(sys.executable).parent / "ray"
    start = f"ulimit -n 4096; {ray} start --block --disable-usage-stats "
    head = "--head --include-dashboard=false --num-cpus=1 --node-ip-address=127.0.0.1 "
    nodes = [
        f"{head} --port={address.partition(':')[2]} --temp-dir={folder}",
        f"--address={address} --node-ip-address=127.0.0.2 --num-cpus=1 "
        """--resources='{"worker": 1}'""",
    ]
    started = []
    for node in nodes:
        command = ["/bin/bash", "-c", "--", start + node]
        with (tmp_path / f"node{len(started)}").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_until(lambda: "block forever" in (tmp_path / f"node{len(started) - 1}").read_text())
    (tmp_path / "trial.py").write_text(TRIAL)
    run = [sys.executable, str(tmp_path / "trial.py"), address, str(tmp_path / "saved")]
    with (tmp_path / "driver").open("w") as log:
        driver = subprocess.Popen(run, env=environment, stdout=log, stderr=log)
    wait_until((tmp_path / "running").exists)
    yield started[1]
    driver.kill()
    for process in (driver, *reversed(started)):
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing in a minute")


@pytest.mark.chaos
def test_trial_saves_itself_when_its_worker_is_stopped(
    worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    began = time.monotonic()
    worker.terminate()
    worker.wait(timeout=30)
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - began < 15  # the drain ended when the node was empty
