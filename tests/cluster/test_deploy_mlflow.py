"""MLflow in the deploy files: closed, and tried for real."""

from __future__ import annotations

import base64
import configparser
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.manifests import (
    DEPLOY,
    MANIFESTS,
    RAY_UP,
    clusters,
    dockerfile,
    env,
    flags,
    mlflow_commands,
    pods,
)
from tests.processes import free_port


def test_mlflow_runs_where_it_should_and_nowhere_else() -> None:
    texts = [path for path in DEPLOY.rglob("*") if path.is_file()]
    by_word = {
        path.stem for path in texts if re.search(r"mlflow(\n *- | )server\b", path.read_text())
    }
    assert by_word >= {"mlflow", "ray-up"}
    assert {name.split("/")[0] for name in mlflow_commands()} == {"mlflow", "ray-up"}


@pytest.mark.parametrize("name", mlflow_commands())
def test_mlflow_is_closed(name: str) -> None:
    command = mlflow_commands()[name]
    given = flags(command)
    assert given["app-name"] == "basic-auth"
    assert given["backend-store-uri"].startswith(("sqlite:////", "postgresql://"))
    assert given["artifacts-destination"].startswith("/")
    hosts, origins = given["allowed-hosts"].split(","), given["cors-allowed-origins"].split(",")
    assert not any("*" in entry for entry in hosts + origins)
    assert {origin.partition("://")[2] for origin in origins} <= set(hosts)
    options = {part.partition("=")[0] for part in command}
    assert not options & {
        "--disable-security-middleware",
        "--gunicorn-opts",
        "--waitress-opts",
        "--dev",
    }
    # In a pod it listens on all addresses, behind the network policy.
    assert given["host"] == ("127.0.0.1" if name.startswith("ray-up") else "0.0.0.0")


def test_mlflow_takes_its_secrets_from_outside() -> None:
    container = pods(MANIFESTS["mlflow/Deployment/mlflow"])[0]["containers"][0]
    assert env(container)["MLFLOW_AUTH_ADMIN_PASSWORD"] == "prunefront-mlflow/admin-password"
    assert env(container)["MLFLOW_FLASK_SERVER_SECRET_KEY"] == "prunefront-mlflow/secret-key"
    ini = configparser.ConfigParser()
    ini.read_string(MANIFESTS["mlflow/ConfigMap/prunefront-mlflow"]["data"]["auth.ini"])
    assert ini["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "admin_password" not in ini["mlflow"]
    starts = [c for c in RAY_UP["head_start_ray_commands"] if "mlflow server " in c]
    assert all(". ~/secrets/mlflow.env" in command for command in starts)


def test_workers_do_not_get_mlflows_password() -> None:
    spec = clusters()["raycluster"]
    head = env(spec["headGroupSpec"]["template"]["spec"]["containers"][0])
    worker = env(spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0])
    assert head["MLFLOW_TRACKING_PASSWORD"] == "prunefront-mlflow-driver/password"
    assert not any(name.startswith("MLFLOW_TRACKING") for name in worker)


def test_pickles_are_refused_everywhere() -> None:
    for name, manifest in MANIFESTS.items():
        for pod in pods(manifest):
            for container in pod["containers"]:
                assert env(container)["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false", name
    said = re.compile(r"MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false$", re.MULTILINE)
    for file in ("due.cron", "due.service", "ray-up.yaml"):
        assert said.search((DEPLOY / file).read_text()), file
    assert re.search(r"MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false\b", dockerfile())


Ask = Callable[..., int]


@pytest.fixture
def mlflow_of_the_manifest(tmp_path: Path) -> Iterator[tuple[Ask, int]]:
    """The manifest's command and auth.ini, on loopback; yields what asks it, and its port."""
    port = free_port()

    def here(text: str) -> str:
        text = text.replace("0.0.0.0", "127.0.0.1").replace("5000", str(port))
        return re.sub(r"(?<!\w)/mlflow/", f"{tmp_path}/", text)

    ini = tmp_path / "auth.ini"
    ini.write_text(here(MANIFESTS["mlflow/ConfigMap/prunefront-mlflow"]["data"]["auth.ini"]))
    container = pods(MANIFESTS["mlflow/Deployment/mlflow"])[0]["containers"][0]
    constants = {k: v for k, v in env(container).items() if v in ("true", "false")}
    environment = (
        os.environ
        | constants
        | {
            "MLFLOW_AUTH_CONFIG_PATH": str(ini),
            "MLFLOW_AUTH_ADMIN_PASSWORD": "long-enough-for-it",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key",
        }
    )
    command = [str(Path(sys.executable).parent / "mlflow"), *map(here, container["command"][1:])]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    def ask(path: str, *, user: str = "", **headers: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        request.add_header("Host", headers.get("host", f"mlflow:{port}"))
        if user:
            request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
        if "origin" in headers:
            request.method, request.data = "POST", b'{"name": "from a web page"}'
            request.add_header("Origin", headers["origin"])
            request.add_header("Content-Type", "application/json")
        try:
            return int(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as refused:
            return refused.code

    yield ask, port
    server.terminate()
    server.wait(timeout=30)


def wait_for(ask: Ask, log: Path) -> None:
    for _ in range(600):
        try:
            if ask("/health") == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_mlflow_of_the_manifest_keeps_strangers_out(
    mlflow_of_the_manifest: tuple[Ask, int], tmp_path: Path
) -> None:
    ask, port = mlflow_of_the_manifest
    wait_for(ask, tmp_path / "log")
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    admin = "admin:long-enough-for-it"
    assert ask(search) == 401
    assert ask("/") == 401
    assert ask("/api/2.0/mlflow-artifacts/artifacts") == 401
    assert ask(search, user="admin:password1234") == 401
    assert ask(search, user=admin) == 200
    assert ask(search, user=admin, host=f"localhost:{port}") == 200
    assert ask(search, user=admin, host="rebound.example") == 403
    create = "/api/2.0/mlflow/experiments/create"
    assert ask(create, user=admin, origin="https://elsewhere.example") == 403
    assert ask(create, user=admin, origin=f"http://localhost:{port}") == 200
    assert (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "auth.db").exists()
