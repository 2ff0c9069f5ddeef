"""How long MLflow's page takes to show a sweep of 1,000 trials, and what its artifacts weigh.

    python tests/benchmarks/mlflow_page.py

Trials are made up (`simulated.py`) and logged as a sweep logs them, to SQLite. Then headless
Chromium opens the pages of `mlflow ui`, each several times, in a window that has loaded MLflow's
program before, as a reviewer's has: from the address to the moment at which the last of what the
page is opened for is there. `--keep` runs it on a folder that is there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engine_scale import ROOT, engine_of, feed
from mlflow.tracking import MlflowClient
from playwright.sync_api import Page, sync_playwright
from sizing import server

from search.tracking.addresses import local_uri
from search.tracking.views import FRONT, TRIALS, view_address

QUIET = ("no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")


def make(folder: str, trials: int) -> None:
    """Log a sweep."""
    engine = engine_of("page", folder, trials, "nsga2")
    feed(engine)
    ledger, tracker = engine.recorder.ledger, engine.recorder.tracker
    front = ledger.growing.front
    assert front is not None
    tracker.finish(front, list(ledger.records.values()))


def seconds_until(page: Page, address: str, arrived: Callable[[Page], None]) -> float:
    """Open a page anew; return the seconds until what it is for is there."""
    page.goto("about:blank")
    start = time.perf_counter()
    page.goto(address)
    arrived(page)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="folder of the sweep, made if it is not there")
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        if not (folder / "page").exists():
            make(str(folder), args.trials)
        measure(folder / "page", args.rounds)


def measure(directory: Path, rounds: int) -> None:
    """Open the pages of a sweep, and print what they took."""
    uri = local_uri(directory)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("page").experiment_id
    runs = client.search_runs([experiment], max_results=50_000)
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    measured = [run for run in runs if "cost_ratio" in run.data.metrics]
    of_front = [run for run in measured if run.data.tags["front"] == "true"]
    cheapest, first = (
        min(some, key=lambda run: run.data.metrics["cost_ratio"]).info.run_name
        for some in (measured, of_front)
    )
    base = f"#/experiments/{experiment}/runs"

    def row(page: Page) -> None:
        page.get_by_role("gridcell", name="page").first.wait_for()

    def member(page: Page) -> None:
        page.get_by_role("link", name=first).first.wait_for()

    def trials(page: Page) -> None:
        page.get_by_role("link", name=cheapest).first.wait_for()

    def note(page: Page) -> None:
        page.get_by_role("columnheader", name="images/s").wait_for()

    def plot(page: Page) -> None:
        page.frame_locator("iframe").locator(".scatterlayer .points path").first.wait_for()

    pages = {
        "the experiment": (f"{base}?workflowType=machine_learning", row),
        "its view of the front": (view_address(experiment, FRONT), member),
        "its view of all trials": (view_address(experiment, TRIALS), trials),
        "the parent run's note": (f"{base}/{parent.info.run_id}", note),
        "the plot": (f"{base}/{parent.info.run_id}/artifacts/front.html", plot),
    }
    print(
        f"{len(runs) - 1} trials, {(directory / 'mlflow.db').stat().st_size / 1e6:.0f} MB of SQLite"
    )
    weigh(directory / "mlartifacts", parent.info.run_id)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with server(directory) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=[f"--{flag}" for flag in QUIET]
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        print("| page | s, median | longest |\n|---|---|---|")
        for name, (path, arrived) in pages.items():
            seconds_until(page, f"{address}/{path}", arrived)  # MLflow's own program is loaded
            taken = [seconds_until(page, f"{address}/{path}", arrived) for _ in range(rounds)]
            print(f"| {name} | {statistics.median(taken):.2f} | {max(taken):.2f} |", flush=True)
        browser.close()


def weigh(artifacts: Path, parent: str) -> None:
    """Print what the largest artifacts weigh, of the trials and of the parent run."""
    sizes = {path: path.stat().st_size for path in artifacts.rglob("*") if path.is_file()}
    for whose, of_parent in (("a trial", False), ("the parent run", True)):
        mine = {p: size for p, size in sizes.items() if (parent in p.parts) == of_parent}
        largest = max(mine, key=lambda path: mine[path])
        print(f"largest artifact of {whose}: {largest.name}, {mine[largest] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
