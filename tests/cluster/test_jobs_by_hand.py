"""The line for clusters of docs/clusters.md, for real: `ray job submit` with a token."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

RAY = str(Path(sys.executable).parent / "ray")


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def submit_when_ready(
    environment: dict[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    """Submit as soon as the head takes jobs: its dashboard is up before its agent is."""
    for _ in range(30):
        done = submit(environment, *command)
        starting = "No available agent" in done.stderr or "Failed to connect" in done.stderr
        if done.returncode == 0 or not starting:
            break
    return done


@pytest.mark.timeout(240)
def test_a_sweep_runs_as_a_ray_job(cluster: dict[str, str], sweep_file: Path) -> None:
    sets = ["trials=3", "ladder=1"]
    sweep = [sys.executable, "-m", "search", "run", str(sweep_file), "--set", *sets]
    done = submit_when_ready(cluster, *sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\[3/3\] .*: val", done.stdout)
    front = json.loads((sweep_file.parent / "results" / "tiny" / "front.json").read_text())
    assert front["front"]

    # Without the token nobody gets in.
    stranger = {**cluster, "RAY_AUTH_TOKEN_PATH": str(sweep_file)}
    refused = submit(stranger, "true")
    assert refused.returncode != 0
