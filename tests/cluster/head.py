"""A Ray cluster of one node, as a person starts it, whose token the tests know."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import BIN, free_port

TOKEN = "0123456789abcdef" * 4


@contextmanager
def head_node(token: Path) -> Iterator[dict[str, str]]:
    """Start a head node that asks for the token in this file; yields a submitter's environment."""
    dashboard = free_port()
    token.write_text(TOKEN)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}  # as after `source .venv/bin/activate`
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # not tmp_path: paths of sockets must be short
    started = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    started += [f"--port={free_port()}", f"--temp-dir={folder}", "--disable-usage-stats"]
    started += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    started += [f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen(
        started, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{dashboard}"
    _wait_until_it_takes_jobs(address)
    yield environment | {"RAY_API_SERVER_ADDRESS": address}
    head.terminate()
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_takes_jobs(address: str) -> None:
    """The dashboard is up before its agent is, and lists jobs only with it."""
    request = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} takes no jobs")
