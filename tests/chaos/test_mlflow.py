"""What happens to MLflow: away, refusing, slow. A real server, whose sweep goes on without it."""

from __future__ import annotations

import dataclasses
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from search.records.files import read_front
from tests.chaos.faults import Faulty, environment, until
from tests.processes import free_port

OUTAGE_S = float(os.environ.get("OUTAGE_S", "0"))
"""How long MLflow is away for at least; without it, until the sweep has gone on for three lines.

Ten minutes, longer than its clients' own attempts: `OUTAGE_S=600 make chaos`.
"""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400 + OUTAGE_S)]


@dataclasses.dataclass
class Server:
    """An MLflow server that can be killed and started again on the same store."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment(), start_new_session=True, **quiet)
        until(self.answers, 120)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path, free_port())
    one.start()
    yield one
    one.signal(signal.SIGCONT)
    one.signal(signal.SIGKILL)


@contextmanager
def refusing(port: int) -> Iterator[list[str]]:
    """A server at that port that answers 503 to everything."""
    asked: list[str] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_GET = do_POST = do_PUT = refuse  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Refusing) as refuser:
        threading.Thread(target=refuser.serve_forever, daemon=True).start()
        yield asked
        refuser.shutdown()


def test_trials_go_on_without_mlflow_and_everything_is_logged_once_in_order(
    server: Server, faulty: Faulty
) -> None:
    one = dataclasses.replace(
        faulty, environment={**faulty.environment, "MLFLOW_TRACKING_URI": server.uri}
    )
    name = "mlflow"
    driver = one.start(name, f'tracking="{server.uri}"', "register_front=true")
    until(lambda: one.lines(name) >= 4, 150)

    server.signal(signal.SIGSTOP)  # slow: it takes requests and does not answer
    lines = one.lines(name)
    until(lambda: one.lines(name) >= lines + 3, 60)
    server.signal(signal.SIGCONT)
    time.sleep(1.0)

    server.signal(signal.SIGKILL)  # away
    lines = one.lines(name)
    until(lambda: one.lines(name) >= lines + 3, 60)
    time.sleep(OUTAGE_S)

    with refusing(server.port) as asked:
        until(lambda: asked, 60)
        until(lambda: one.lines(name) >= 1, 60)
    server.start()
    said = one.finish(driver)
    assert "MLflow lags behind, trials go on: " in said
    one.same(name, "whole")
    versions = MlflowClient(server.uri).search_model_versions(f"name = '{name}'")
    members = read_front(one.directory(name) / "front.json").members
    assert sorted(v.tags["trial"] for v in versions) == sorted(m.trial for m in members)
    assert all(v.tags["verified"] == "true" for v in versions)
