"""What a trial costs those who serve it: requests to MLflow, bytes on the storage.

    python tests/benchmarks/sizing.py

Runs two sweeps of the sample, with one epoch and with three, against a real MLflow server, and
counts what the driver sends. Trials' files are weighed at their end, and what an epoch writes
(weights, state of the optimiser) while one runs. A last table scales that, and what engine_scale.py
measured of the driver, to numbers of GPUs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import ray
import requests

from search.__main__ import main as search

ROOT = Path(__file__).parents[2]
SETS = ("ladder=2", "alone=0", "halving=false", "concurrency=2", "sampler='random'", "refine=0.0")
SETS += ("register_front=false",)  # which sends some more for each member of the front
GPUS = (1, 8, 64, 512)
DRIVER_MS, DRIVER_KB = 76, 115
"""Per trial of four reports at 5,000 trials: engine_scale.py."""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """An MLflow server on SQLite."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    yield uri
    process.terminate()
    process.wait()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the requests that this process sends, by what they ask for."""
    sent: Counter[str] = Counter()
    send = requests.Session.send

    def counting(session: requests.Session, request: requests.PreparedRequest, **more: object):
        sent[str(request.path_url).partition("?")[0].rpartition("/")[2]] += 1
        return send(session, request, **more)

    requests.Session.send = counting  # type: ignore[method-assign]
    yield sent
    requests.Session.send = send  # type: ignore[method-assign]


class Largest(threading.Thread):
    """The largest a trial's folder gets, in bytes: what an epoch writes beside what was there."""

    def __init__(self, models: Path) -> None:
        super().__init__(daemon=True)
        self.models, self.bytes, self.end = models, 0, threading.Event()

    def run(self) -> None:
        while not self.end.wait(0.02):
            for folder in self.models.glob("*/epoch-*"):
                self.bytes = max(self.bytes, size(folder))


def size(folder: Path) -> int:
    """Bytes of a folder's files; those that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def one_sweep(folder: Path, uri: str, trials: int, epochs: int) -> dict[str, float]:
    """Run a sweep; return requests, bytes that stay and bytes of an epoch, each per trial."""
    name = f"sizing-{trials}-{epochs}"
    sets = [f'name="{name}"', f'storage="{folder}"', f'tracking="{uri}"', *SETS]
    sets += [f"trials={trials}", f"epochs={epochs}"]
    largest = Largest(folder / name / "models")
    largest.start()
    with counted() as sent, redirect_stdout(io.StringIO()):
        code = search(["run", str(ROOT / "search" / "sweeps" / "sample.toml"), "--set", *sets])
    assert code == 0
    largest.end.set()
    left = [size(path) for path in (folder / name / "models").iterdir()]
    last = sorted((folder / name / "models").iterdir())[-1]
    weights = next(last.rglob("model.safetensors")).stat().st_size
    ledger = (folder / name / "ledger.jsonl").stat().st_size
    return {
        "requests": sum(sent.values()),
        "kept": sum(left) / len(left),
        "epoch": largest.bytes,
        "weights": weights,
        "ledger": ledger / trials,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    trials = parser.parse_args().trials
    os.chdir(ROOT)
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as uri:
        few = one_sweep(Path(folder), uri, trials, 1)
        more = one_sweep(Path(folder), uri, trials, 3)
        twice = one_sweep(Path(folder), uri, 2 * trials, 1)
    per_epoch = (more["requests"] - few["requests"]) / (2 * (trials - 1))
    per_trial = (twice["requests"] - few["requests"]) / trials - per_epoch
    print(json.dumps({"1 epoch": few, "3 epochs": more, "twice the trials": twice}, indent=1))
    print(f"MLflow: {per_trial:.1f} requests per trial and {per_epoch:.1f} per epoch")
    print(f"storage: {few['kept'] / few['weights']:.2f} times the weights stay of a trial,")
    print(f"  {few['epoch'] / few['weights']:.2f} times are written per epoch")
    print(
        "| GPUs | trials/h | driver, % of a core | memory for 1,000 trials | MLflow, requests/s |"
    )
    for gpus in GPUS:
        hourly = gpus * 6 / 3  # trials of three epochs, ten minutes each
        rate = hourly * (per_trial + 4 * per_epoch) / 3600
        busy = 100 * hourly * DRIVER_MS / 1000 / 3600
        print(f"| {gpus} | {hourly:g} | {busy:.2f} | {DRIVER_KB} MB | {rate:.3f} |")


if __name__ == "__main__":
    main()
