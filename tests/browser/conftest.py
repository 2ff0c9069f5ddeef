"""A sweep as a newcomer has it, MLflow's server on it, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
import ray
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.demo import ROOT, Demo, python, server

QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET += ("disable-component-update", "disable-sync", "no-sandbox")


PATIENCE_MS = 60_000
"""How long a page may take: two cores run all tests."""


@pytest.fixture(scope="session")
def demo(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, with fewer trials and images."""
    storage = tmp_path_factory.mktemp("demo")
    sets = ["trials=5", "ladder=3", "epochs=1", "halving=false", "data.calibration=64"]
    sets += ["budget=[0.06,0.8]", f'storage="{storage}"']  # so small that the front has two ends
    for split, images in (("train", 256), ("val", 200), ("test", 100)):
        path = storage / f"{split}.parquet"
        pq.write_table(pq.read_table(ROOT / f"search/sample/{split}.parquet")[:images], path)
        sets.append(f'data.{split}="{path}"')
    address = ray.get_runtime_context().gcs_address
    command = ("-m", "search", "run", "search/sweeps/sample.toml", "--set", *sets)
    said = python(*command, RAY_ADDRESS=address)
    return Demo(directory=storage / "sample", said=said)


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
