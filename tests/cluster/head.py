"""A Ray cluster of one node, as a person starts it, whose token the tests know."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.forks.client import SOCKET, ray_workers
from tests.processes import BIN, ROOT, free_port

TOKEN = "0123456789abcdef" * 4


@contextmanager
def head_node(token: Path) -> Iterator[dict[str, str]]:
    """Start a head node that asks for the token in this file; yields a submitter's environment.

    Its workers are forked; what they import that is not installed comes from where a job says.
    """
    dashboard = free_port()
    token.write_text(TOKEN)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}  # as after `source .venv/bin/activate`
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # not tmp_path: paths of sockets must be short
    given = {"num_cpus": 2, "temp_dir": str(folder), **ray_workers()}
    given |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
    given |= {"dashboard_agent_listen_port": free_port()}
    head = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.run_head", json.dumps(given)],
        cwd=ROOT,
        env=environment | {SOCKET: os.environ[SOCKET], "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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
