from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from search.__main__ import main
from search.tracking.promote import tracking_uri
from tests.processes import BIN, free_port
from tests.search.made import Made
from tests.search.store import Sweep, World

pytestmark = pytest.mark.slow  # stores of MLflow are opened for real


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("store"))


@pytest.fixture
def sweep(world: World) -> Sweep:
    """A sweep with two versions, both on its front."""
    sweep = world.sweep((0.2, 50.0), (0.45, 60.0))
    sweep.register()
    for member in sweep.members:
        world.client.set_tag(sweep.runs.trials[member.trial], "front", "true")
    return sweep


def promote(sweep: Sweep, *arguments: str) -> int:
    return main(["promote", *arguments, "--tracking", sweep.world.uri])


def approved(sweep: Sweep) -> str | None:
    found = sweep.world.client.get_registered_model(sweep.name).aliases.get("approved")
    return None if found is None else str(found)


def test_a_person_approves_a_version(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert approved(sweep) is None
    assert promote(sweep, sweep.name, "2") == 0
    assert approved(sweep) == "2"
    said, how = capsys.readouterr().out.splitlines()
    assert said == (
        f"approved version 2 of {sweep.name}: trial 0002 of sweep {sweep.name}, validation 60.0 %, "
        "test 59.0 %, 0.45x the dense model's effective_gmacs"
    )
    assert how == (
        f"serve it with: MLFLOW_TRACKING_URI={sweep.world.uri} "
        f"mlflow models serve -m models:/{sweep.name}@approved --env-manager local --port 5001"
    )
    assert promote(sweep, sweep.name, "1") == 0
    assert approved(sweep) == "1"


def refused(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    return line.removeprefix("error: ")


def test_what_is_no_longer_on_the_front_is_refused(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.world.client.set_tag(sweep.runs.trials["0001"], "front", "false")
    line = refused(promote(sweep, sweep.name, "1"), capsys)
    name = sweep.name
    assert line == (
        f"version 1 of {name} is trial 0001, which is not on the front of sweep {name}; "
        "give a member of the front"
    )
    assert approved(sweep) is None


def test_what_was_not_verified_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = world.sweep((0.2, 50.0))
    sweep.served["0001"] = dataclasses.replace(sweep.served["0001"], reason="it is far off")
    sweep.register()
    world.client.set_tag(sweep.runs.trials["0001"], "front", "true")
    line = refused(promote(sweep, sweep.name, "1"), capsys)
    assert line.startswith(f"version 1 of {sweep.name} is not verified: it is far off;")
    assert approved(sweep) is None


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_what_is_not_what_was_verified_is_refused(
    change: str, sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sweep.world.client.get_model_version(sweep.name, "2").source
    stored = Path(source.removeprefix("file://"))
    if change == "changed":
        weights = stored / "extra_files" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[500] ^= 1
        weights.write_bytes(content)
    elif change == "added":
        (stored / "conda.yaml").write_text("name: mine")
    else:
        (stored / "MLmodel").unlink()
    line = refused(promote(sweep, sweep.name, "2"), capsys)
    assert f"version 2 of {sweep.name} is not what was verified: its files have SHA-256 " in line
    assert approved(sweep) is None
    assert promote(sweep, sweep.name, "1") == 0


def test_what_is_gone_is_refused(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(promote(sweep, sweep.name, "9"), capsys)
    assert f"version 9 of {sweep.name} in {sweep.world.uri}: " in line
    assert "not found" in line
    assert "not found" in refused(promote(sweep, "nowhere", "1"), capsys)
    line = refused(promote(sweep, sweep.name, "approved"), capsys)
    assert line == f"version approved of {sweep.name}: give the number of a version, for example 3"


def test_what_no_sweep_registered_is_refused(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = world.sweep()
    world.client.create_registered_model(sweep.name)
    world.client.create_model_version(sweep.name, (world.folder / "elsewhere").as_uri())
    line = refused(promote(sweep, sweep.name, "1"), capsys)
    assert line == f"version 1 of {sweep.name} was registered by no sweep; give one that was"


def test_where_to_look_must_be_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    line = refused(main(["promote", "m", "1"]), capsys)
    assert line.startswith("MLFLOW_TRACKING_URI is not set; set it, or give --tracking: ")
    assert "sqlite:///results/NAME/mlflow.db" in line
    line = refused(main(["promote", "m", "1", "--tracking", str(tmp_path)]), capsys)
    assert line == (
        f"--tracking is {str(tmp_path)!r}, where no mlflow.db is; give a URI, or the directory of "
        "a sweep that was logged there"
    )
    secret = "https://me:secret@mlflow"
    line = refused(main(["promote", "m", "1", "--tracking", secret]), capsys)
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert "secret" not in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    line = refused(main(["promote", "m", "1"]), capsys)
    assert line.startswith("version 1 of m in http://127.0.0.1:9: ")


def test_a_sweeps_directory_stands_for_its_own_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("http://tracker:5000") == "http://tracker:5000"


@contextmanager
def serving(line: str, folder: Path) -> Iterator[str]:
    """Run the command of a line as a person does, but at a port that is free; yield its address."""
    port, command = free_port(), line.removeprefix("serve it with: ")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}  # as where it is activated
    with (folder / "served.log").open("w") as said:
        server = subprocess.Popen(
            f"{command} --port {port}",
            shell=True,
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while not answers(f"{address}/ping"):
            assert server.poll() is None, (folder / "served.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_what_is_approved_is_served_by_the_command_that_is_printed(
    made: Made, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlflow models serve`, a real request, and PyTorch's logits."""
    sweep = world.sweep((0.45, 60.0))
    sweep.served["0001"] = made.served
    sweep.register()
    world.client.set_tag(sweep.runs.trials["0001"], "front", "true")
    assert promote(sweep, sweep.name, "1") == 0
    line = capsys.readouterr().out.splitlines()[1]
    images = np.random.default_rng(1).normal(size=(3, 3, 24, 16)).astype(np.float32)
    with serving(line, tmp_path) as address:
        request = urllib.request.Request(
            f"{address}/invocations",
            json.dumps({"inputs": images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            predictions = json.load(answer)["predictions"]
        example = (made.served.directory / "serving_input_example.json").read_bytes()
        request = urllib.request.Request(
            f"{address}/invocations", example, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert np.shape(json.load(answer)["predictions"]["logits"]) == (2, 5)
    with torch.no_grad():
        expected = made.vit(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(predictions["logits"], expected, rtol=0, atol=1e-4)
