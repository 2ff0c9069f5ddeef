"""The three files that run `python -m cluster due` each minute."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.manifests import (
    DEPLOY,
    MANIFESTS,
    ROOT,
    flags,
    mlflow_commands,
    pods,
)


def cron_line() -> str:
    lines = (DEPLOY / "due.cron").read_text().splitlines()
    jobs = [line for line in lines if line and not re.match(r"#|[A-Z_]+=", line)]
    assert len(jobs) == 1
    return jobs[0]


def service() -> configparser.RawConfigParser:
    return unit("due.service")


def unit(name: str) -> configparser.RawConfigParser:
    """A systemd unit; of a key that is there several times the last."""
    parser = configparser.RawConfigParser(strict=False, delimiters=["="])
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


def due_commands() -> dict[str, list[str]]:
    """What each of the three runs, from `python` on."""
    container = pods(MANIFESTS["due/CronJob/due"])[0]["containers"][0]
    systemd = shlex.split(service()["Service"]["ExecStart"])
    cron = shlex.split(cron_line())
    return {
        "kubernetes": container["command"],
        "systemd": ["python", *systemd[1:]],
        "cron": cron[cron.index("python") :],
    }


def test_cron_file_runs_each_minute_as_a_user() -> None:
    fields = cron_line().split(maxsplit=6)
    assert fields[:6] == ["*"] * 5 + ["prunefront"]
    assert "%" not in fields[6]  # which cron takes for the end of the line
    checked = subprocess.run(["bash", "-n", "-c", fields[6]], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert (DEPLOY / "due.cron").read_text().endswith("\n")  # or cron ignores the last line


def test_timer_starts_the_service_each_minute() -> None:
    timer = unit("due.timer")
    assert timer["Timer"]["OnCalendar"] == "minutely"
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert service()["Service"]["Type"] == "oneshot"
    assert Path(shlex.split(service()["Service"]["ExecStart"])[0]).name == "python"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("wrong", [None, ("Type=oneshot", "Type=oneshoot")])
def test_systemd_finds_nothing_wrong(tmp_path: Path, wrong: tuple[str, str] | None) -> None:
    text = (DEPLOY / "due.service").read_text()
    python, folder = Path(sys.executable).resolve(), Path("/tmp")
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={python}", text)
    text = re.sub(r"(?m)^WorkingDirectory=\S+", f"WorkingDirectory={folder}", text)
    text = text.replace("User=prunefront", "User=root")
    if wrong:
        text = text.replace(*wrong)
    (tmp_path / "prunefront-due.service").write_text(text)
    shutil.copy(DEPLOY / "due.timer", tmp_path / "prunefront-due.timer")
    units = [str(tmp_path / "prunefront-due.service"), str(tmp_path / "prunefront-due.timer")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode == 0 and not done.stderr) == (wrong is None), done.stderr


def test_cron_job_does_not_overlap() -> None:
    spec = MANIFESTS["due/CronJob/due"]["spec"]
    assert spec["schedule"] == "* * * * *"
    assert spec["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("name", due_commands())
def test_due_is_a_verb_of_cluster(name: str) -> None:
    command = due_commands()[name]
    assert command[:4] == ["python", "-m", "cluster", "due"]
    told = subprocess.run(
        [sys.executable, "-m", "cluster", "due", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    for part in command[4:]:
        assert re.search(rf"^  {part.partition('=')[0]}\b", told.stdout, re.MULTILINE), part


@pytest.mark.parametrize("file", ["due.cron", "due.service"])
def test_due_has_loopback_addresses_and_a_token(file: str) -> None:
    text = (DEPLOY / file).read_text()
    given = dict(re.findall(r"(?m)^(?:Environment=)?([A-Z_]+)=(\S+)$", text))
    assert given["RAY_AUTH_MODE"] == "token"
    assert given["RAY_AUTH_TOKEN_PATH"].endswith("/ray-token")
    assert given["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8265"
    assert given["MLFLOW_TRACKING_URI"] == "http://localhost:5000"


def test_due_reaches_the_cluster_and_mlflow_of_the_manifests() -> None:
    given = flags(due_commands()["kubernetes"])
    head = MANIFESTS["raycluster/RayCluster/prunefront"]["metadata"]["name"]
    assert given["address"] == f"http://{head}-head-svc:8265"
    served = MANIFESTS["mlflow/Service/mlflow"]
    host = f"{served['metadata']['name']}:{served['spec']['ports'][0]['port']}"
    assert given["tracking"] == f"http://{host}"
    assert host in flags(mlflow_commands()["mlflow/Deployment/mlflow/mlflow"])[
        "allowed-hosts"
    ].split(",")
