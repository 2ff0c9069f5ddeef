"""A sweep under faults: started, watched, harmed, and compared with the same sweep undisturbed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow.tracking import MlflowClient

from search.records.files import read_front, read_trials
from search.records.journal import Journal
from search.tracking.addresses import local_uri
from tests.forks.client import Forked
from tests.processes import ROOT
from tests.sweeps import write_sweep

SETS = ("trials=6", "ladder=0", "epochs=2", "concurrency=1", "finetune.lr=0.01")
SETS += ("halving={first=1, eta=2}", "data.batch_size=1")  # epochs of a second or so


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """Sweeps of one TOML file on one Ray, with different names.

    Attributes:
        sweep: The file.
        environment: Of the drivers; RAY_ADDRESS says which Ray.
        driver: Module that runs a sweep, and what it is told first.
    """

    sweep: Path
    environment: dict[str, str]
    driver: tuple[str, ...] = ("search",)

    def directory(self, name: str) -> Path:
        """Where a sweep of that name lies."""
        return self.sweep.parent / "results" / name

    def start(self, name: str, *sets: str) -> Forked:
        """Start a driver, in a session of its own."""
        run = ["run", str(self.sweep), "--set", f'name="{name}"', *SETS, *sets]
        return Forked(["-m", *self.driver, *run], self.environment, ROOT)

    def finish(self, driver: Forked, code: int = 0) -> str:
        """Wait for a driver to end with this exit code and return what it printed."""
        said, _ = driver.communicate(timeout=200)
        assert driver.returncode == code, said
        return said

    def run(self, name: str, *sets: str) -> str:
        """Run a sweep to its end, undisturbed."""
        return self.finish(self.start(name, *sets))

    def lines(self, name: str) -> int:
        """How many events a sweep has seen so far."""
        path = self.directory(name) / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The events of a kind in a sweep's ledger, so far."""
        journal = Journal(self.directory(name) / "ledger.jsonl")
        return [event for event in journal.read() if event["event"] == kind]

    def same(self, name: str, as_of: str) -> None:
        """Check that a sweep came to what another one came to, plan for plan, epoch for epoch."""
        one, other = (epochs_of(self.directory(n)) for n in (name, as_of))
        assert one == other
        self.counts(name)
        fronts = [read_front(self.directory(n) / "front.json") for n in (name, as_of)]
        assert [m.trial for m in fronts[0].members] == [m.trial for m in fronts[1].members]
        assert [m.plan for m in fronts[0].members] == [m.plan for m in fronts[1].members]
        assert fronts[0].hypervolume == fronts[1].hypervolume
        assert [m.test_top1 for m in fronts[0].members] == [m.test_top1 for m in fronts[1].members]

    def counts(self, name: str) -> None:
        """Check that epochs in the ledger, in `trials.parquet` and in MLflow are the same, once."""
        reported: dict[str, list[int]] = {}
        for event in self.events(name, "epoch"):
            result = event["result"]
            reported.setdefault(result["trial"], []).append(result["epoch"])
        directory = self.directory(name)
        table = {
            trial: [epoch[0] for epoch in record["history"]]
            for trial, record in epochs_of(directory).items()
        }
        assert reported == table == logged_epochs(directory, self.environment)
        assert all(epochs == list(range(len(epochs))) for epochs in reported.values())


def epochs_of(directory: Path) -> dict[str, dict[str, Any]]:
    """What a sweep came to, trial by trial, but for times."""
    return {
        r.trial: {
            "plan": r.plan,
            "status": r.status,
            "val_top1": r.val_top1,
            "history": [(h["epoch"], h["val_top1"], h["train_loss"]) for h in r.history],
        }
        for r in read_trials(directory / "trials.parquet")
    }


def logged_epochs(directory: Path, environment: dict[str, str]) -> dict[str, list[int]]:
    """Trial -> epochs in MLflow, in the order in which they were logged."""
    client = MlflowClient(environment.get("MLFLOW_TRACKING_URI") or local_uri(directory))
    runs = client.search_runs([client.get_experiment_by_name(directory.name).experiment_id])
    assert len({run.info.run_id for run in runs}) == len(runs)
    logged = [
        (
            run.data.tags["trial"],
            [m.step for m in client.get_metric_history(run.info.run_id, "val_top1")],
        )
        for run in runs
        if "trial" in run.data.tags
    ]
    assert len(dict(logged)) == len(logged)  # one run per trial
    return dict(logged)


def until(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    """Wait until something is so; return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def actors(title: str = "ray::_Inner") -> list[psutil.Process]:
    """The processes below this one whose title begins so: those that run trials.

    `_Inner` is what `tune.with_parameters` makes of `PlanTrial`.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process, with these variables."""
    return {**os.environ, **variables}


def on_logical_gpus(address: str, folder: Path) -> Faulty:
    """Sweeps in an empty folder, on a cluster whose GPUs exist for Ray alone."""
    (folder / "gpus").mkdir()
    variables = {"RAY_ADDRESS": address, "GPU_NOTES": str(folder / "gpus")}
    return Faulty(
        sweep=write_sweep(folder),
        environment=environment(PYTHONPATH=str(ROOT), **variables),
        driver=("tests.chaos.driver", "cpu_for_gpu"),
    )
