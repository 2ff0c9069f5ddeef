"""Starts processes that begin with their imports made, and nodes of Ray whose workers do."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.processes import ROOT

SOCKET = "FORKS_SOCKET"
"""Environment variable: where the server of these tests listens."""


@cache
def address() -> str:
    """Start the server of this process, which ends with it; return where it listens."""
    path = Path(tempfile.mkdtemp(prefix="forks")) / "socket"  # paths of sockets must be short
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks.server", str(path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return str(path)


def ray_workers() -> dict[str, str]:
    """Return arguments for a node of `ray.cluster_utils.Cluster`, whose workers are then forked."""
    os.environ[SOCKET] = address()
    return {"worker_path": str(Path(__file__).with_name("ray_worker.py"))}


def ask(path: str, arguments: Sequence[str], files: Sequence[int], **more: object) -> socket.socket:
    """Ask a server for a process with these files 0, 1 and 2; return where it answers."""
    asker = socket.socket(socket.AF_UNIX)
    asker.connect(path)
    line = json.dumps({"arguments": list(arguments), **more}).encode() + b"\n"
    sent = socket.send_fds(asker, [line], files)
    asker.sendall(line[sent:])
    return asker


def answer(asker: socket.socket) -> int:
    """Wait for a server's next answer."""
    line = b""
    while not line.endswith(b"\n"):
        byte = asker.recv(1)  # no further: a next answer is another's
        if not byte:
            raise ConnectionError("the server of forks is gone")
        line += byte
    return int(line)


class Forked:
    """A process that was forked, shown as `subprocess.Popen` shows one.

    Its standard output and error are one; it has a session of its own.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self.arguments, self.returncode = arguments, None
        self.out, its_out = os.pipe()
        with open(os.devnull) as nothing:
            files = (nothing.fileno(), its_out, its_out)
            more = {"env": dict(env), "cwd": str(cwd), "session": True}
            self.asker = ask(address(), arguments, files, **more)
            self.pid = answer(self.asker)
        os.close(its_out)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return its exit status; None while it runs."""
        if self.returncode is None and select.select([self.asker], [], [], 0)[0]:
            self.returncode = answer(self.asker)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until it has ended, and return what it printed.

        Raises:
            TimeoutExpired: If it has not by then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        said = b""
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.out], [], [], left)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0, said)
            part = os.read(self.out, 1 << 16)
            if not part:
                break
            said += part
        os.close(self.out)
        if self.returncode is None:
            self.returncode = answer(self.asker)
        self.asker.close()
        return said.decode(), None
