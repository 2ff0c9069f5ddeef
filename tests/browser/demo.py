"""The demo, its servers, and what a browser keeps of them."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page

from tests.forks.client import Forked
from tests.processes import BIN, ROOT, free_port

SCREENSHOTS = ROOT / "build" / "screenshots"
"""What the tests saw, for people."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A sweep that was run by the README's command, with fewer trials and images.

    Attributes:
        directory: Where it lies.
        said: What it printed.
    """

    directory: Path
    said: str


def python(*arguments: str, code: int = 0, **variables: str) -> str:
    """Run a command of the README's; return what it printed."""
    process = Forked(arguments, {**os.environ, **variables}, ROOT)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


@contextmanager
def server(*arguments: str, **variables: str) -> Iterator[str]:
    """Run one of MLflow's servers on a free port until it is no longer needed."""
    port = free_port()
    process = subprocess.Popen(
        ["mlflow", *arguments, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health")
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def wait_for(address: str, seconds: float = 120.0) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).read()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{address} did not answer within {seconds} s")


def keep(page: Page, name: str) -> None:
    """Keep a screenshot."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
