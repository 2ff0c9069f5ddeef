"""A sweep as a newcomer has it, MLflow's server on it, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.cluster.conftest import BIN, free_port

ROOT = Path(__file__).parents[2]

SCREENSHOTS = ROOT / "build" / "screenshots"
"""What the tests saw, for people."""

QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET += ("disable-component-update", "disable-sync", "no-sandbox")


PATIENCE_MS = 60_000
"""How long a page may take: two cores run all tests."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A sweep that was run by the README's command, with fewer trials and images.

    Attributes:
        directory: Where it lies.
        said: What it printed.
    """

    directory: Path
    said: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, with fewer trials and images."""
    storage = tmp_path_factory.mktemp("demo")
    sets = ["trials=5", "ladder=3", "epochs=1", "halving=false", f'storage="{storage}"']
    for split, images in (("train", 640), ("val", 400), ("test", 200)):
        path = storage / f"{split}.parquet"
        pq.write_table(pq.read_table(ROOT / f"search/sample/{split}.parquet")[:images], path)
        sets.append(f'data.{split}="{path}"')
    said = python("-m", "search", "run", "search/sweeps/sample.toml", "--set", *sets)
    return Demo(directory=storage / "sample", said=said)


def python(*arguments: str, code: int = 0, **variables: str) -> str:
    """Run a command of the README's; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


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


@pytest.fixture(scope="session")
def mlflow_ui(demo: Demo) -> Iterator[str]:
    """The server whose command the sweep has printed."""
    with server("ui", "--backend-store-uri", f"sqlite:///{demo.directory}/mlflow.db") as address:
        yield address


@pytest.fixture(scope="session")
def browser_page() -> Iterator[Page]:
    """A window of headless Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None and os.environ.get("CI"):
        pytest.fail("there is no Chromium; .ci/run installs one")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=[f"--{flag}" for flag in QUIET]
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield page
        browser.close()


def keep(page: Page, name: str) -> None:
    """Keep a screenshot."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
