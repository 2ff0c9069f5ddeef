"""The commands as a person gives them: a cluster with a token, a laptop without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from search.records.files import read_front
from tests.cluster.head import TOKEN
from tests.processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ABSENT = ("torch", "torchvision", "timm", "optuna", "mlflow", "pyarrow", "numpy", "matplotlib")
ABSENT += ("plotly", "moocore", "safetensors", "tomli_w", "cronsim", "pandas", "scipy")


@pytest.fixture
def laptop(cluster: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a laptop that has ray[default], and no package that trains or tracks."""
    stubs = tmp_path / "laptop"
    stubs.mkdir()
    for name in ABSENT:
        (stubs / f"{name}.py").write_text(f"raise ImportError('{name} is not on this laptop')")
    (tmp_path / "home").mkdir()
    without = {k: v for k, v in cluster.items() if not k.startswith("RAY_AUTH")}
    home = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(stubs)}
    return without | home | {"RAY_AUTH_TOKEN": TOKEN}


def call(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_sweep_is_submitted_followed_and_shown(laptop: dict[str, str], sweep_file: Path) -> None:
    sets = ["--set", "trials=3", "ladder=1", "--name", "journey", "--no-install"]
    done = call(laptop, "submit", str(sweep_file), *sets, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    url = laptop["RAY_API_SERVER_ADDRESS"]
    assert "submitted job journey-2" in done.stdout
    assert f"{url}/#/jobs/journey-2" in done.stdout
    assert "[3/3] " in done.stdout
    front = read_front(sweep_file.parent / "results" / "journey" / "front.json")
    assert front.members
    lease = sweep_file.parent / "results" / "journey" / "lease" / "000001.json"
    assert json.loads(lease.read_text())["driver"].startswith("journey-2")

    status = call(laptop, "status", "journey")
    assert status.returncode == 0
    assert "SUCCEEDED" in status.stdout
    assert "SUCCEEDED" in call(laptop, "status").stdout
    logs = call(laptop, "logs", "journey")
    assert "[3/3] " in logs.stdout
    assert TOKEN not in logs.stdout + done.stdout
    ended = call(laptop, "stop", "journey")
    assert (ended.returncode, "has ended already: SUCCEEDED" in ended.stdout) == (0, True)
    unknown = call(laptop, "logs", "nobody")
    assert (unknown.returncode, "knows no sweep 'nobody'" in unknown.stderr) == (2, True)


@pytest.mark.chaos
def test_a_sweep_is_stopped_and_goes_on(laptop: dict[str, str], sweep_file: Path) -> None:
    sets = ["--set", "trials=4", "epochs=2", "data.batch_size=1", "--no-install"]
    done = call(laptop, "submit", str(sweep_file), *sets)
    assert done.returncode == 0, done.stderr
    assert "follow it: python -m cluster logs tiny --follow" in done.stdout
    again = call(laptop, "submit", str(sweep_file), *sets)
    assert again.returncode == 2
    job = done.stdout.split()[2].rstrip(":")
    assert f"sweep tiny runs already, as job {job}" in again.stderr
    ledger = sweep_file.parent / "results" / "tiny" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ledger.exists() and ledger.read_bytes().count(b"\n") > 4:
            break
        time.sleep(0.2)
    stopped = call(laptop, "stop", "tiny")
    assert stopped.returncode == 0, stopped.stderr
    assert f"stopped job {job}" in stopped.stdout
    assert not (sweep_file.parent / "results" / "tiny" / "done").exists()
    assert "STOPPED" in call(laptop, "status", "tiny").stdout
    done = call(laptop, "submit", str(sweep_file), *sets, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (sweep_file.parent / "results" / "tiny" / "done").exists()


def test_what_is_wrong_is_said_before_anything_is_sent(
    laptop: dict[str, str], sweep_file: Path
) -> None:
    without = {k: v for k, v in laptop.items() if k != "RAY_AUTH_TOKEN"}
    for environment, command, code, message in (
        (laptop, ["submit", "nowhere.toml"], 2, "sweep nowhere.toml does not exist"),
        (laptop, ["submit", str(sweep_file), "--set", "trails=2"], 2, "did you mean 'trials'?"),
        (laptop, ["submit", "search/sweeps/sample.toml"], 2, "storage is 'results'"),
        (without, ["status"], 1, "asks for a token; on the cluster's head run: ray get-auth-token"),
        (without, ["status", "--address", "http://10.1.2.3:8265"], 2, "there is no token"),
    ):
        done = call(environment, *command)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert message in done.stderr


def test_a_job_that_fails_ends_with_its_exit_code(laptop: dict[str, str], sweep_file: Path) -> None:
    (sweep_file.parent / "val.parquet").write_bytes(b"PAR1 torn")
    done = call(laptop, "submit", str(sweep_file), "--name", "fails", "--no-install", "--follow")
    assert done.returncode == 2
    assert "val.parquet is not a Parquet file" in done.stdout
    assert call(laptop, "status", "fails").returncode == 1


def test_a_slot_that_is_due_runs_once(cluster: dict[str, str], sweep_file: Path) -> None:
    """Two machines call at the same moment; whoever claims the slot submits it."""
    folder = sweep_file.parent
    schedules = folder / "schedules.toml"
    yearly = time.strftime("%M %H %d %m *", time.gmtime())  # the minute that has just begun
    schedules.write_text(
        f"""
        [[schedules]]
        name = "yearly"
        cron = "{yearly}"
        zone = "UTC"
        sweep = "{sweep_file}"
        overrides = ["trials=2", "ladder=0"]
        start_from_last = true
        """
    )
    common = ["--schedules", str(schedules), "--tracking", f"sqlite:///{folder}/slots.db"]
    dry = call(cluster, "due", *common, "--dry-run")
    assert "yearly: would run yearly-2" in dry.stdout, dry.stderr
    assert call(cluster, "status", "yearly").returncode == 2  # nothing was submitted
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "cluster", "due", *common, "--no-install", "--follow"],
            cwd=ROOT,
            env=cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [caller.communicate(timeout=200)[0] for caller in both]
    assert [caller.returncode for caller in both] == [0, 0], said
    assert sorted("submitted: due at" in text for text in said) == [False, True], said
    (directory,) = (folder / "results").glob("yearly-*")
    assert (directory / "done").exists()
    client = MlflowClient(f"sqlite:///{folder}/slots.db")
    experiment = client.get_experiment_by_name(directory.name)
    assert experiment.tags["prunefront.job"] == directory.name
    (parent,) = client.search_runs([experiment.experiment_id], "tags.sweep != ''")
    assert parent.info.status == "FINISHED"
    again = call(cluster, "due", *common)
    assert (again.returncode, "submitted" in again.stdout) == (0, False)
