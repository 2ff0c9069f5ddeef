"""What happens to drivers: killed, stopped, started twice, told to end."""

from __future__ import annotations

import os
import signal

import pytest
from mlflow.tracking import MlflowClient

from search.records.files import read_front
from search.tracking.addresses import local_uri
from tests.chaos.faults import Faulty, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def test_a_driver_that_is_killed_again_and_again_changes_nothing(faulty: Faulty) -> None:
    sets = ["trials=10", "confirm=1", "data.batch_size=16"]
    faulty.run("long", *sets)
    assert {e["status"] for e in faulty.events("long", "ended")} == {"dense", "finished", "stopped"}
    for lines in (3, 14, 29):
        driver = faulty.start("killed-drivers", *sets)
        until(lambda lines=lines: faulty.lines("killed-drivers") >= lines)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    said = faulty.run("killed-drivers", *sets)
    assert "watching it" not in said  # a process that has died on this machine is known to have
    assert len(faulty.events("killed-drivers", "began")) == 4
    faulty.same("killed-drivers", "long")
    assert not list(faulty.directory("killed-drivers").glob("ray-*"))  # nothing pickled is left


def test_a_driver_that_is_killed_while_it_registers_registers_once(faulty: Faulty) -> None:
    name, sets = "registering", ["trials=4", "data.batch_size=16", "register_front=true"]
    directory = faulty.directory(name)
    for sign in ("served", "mlartifacts/models"):  # while it exports, and while it uploads
        driver = faulty.start(name, *sets)
        until(lambda sign=sign: (directory / sign).exists(), 150)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    faulty.run(name, *sets)
    client = MlflowClient(local_uri(directory))
    members = [member.trial for member in read_front(directory / "front.json").members]
    versions = client.search_model_versions(f"name = '{name}'")
    assert sorted(version.tags["trial"] for version in versions) == sorted(members)
    experiment = client.get_experiment_by_name(name).experiment_id
    models = client.search_logged_models([experiment])
    assert sorted((m.name, m.status) for m in models) == [(t, "READY") for t in sorted(members)]


def test_a_job_that_is_stopped_goes_on(faulty: Faulty) -> None:
    """Ray stops a job by SIGTERM to its processes; three seconds later it kills them."""
    driver = faulty.start("stopped")
    until(lambda: faulty.lines("stopped") >= 6, 150)
    os.killpg(driver.pid, signal.SIGTERM)
    said = faulty.finish(driver, 130)
    assert "interrupted after" in said
    assert "Traceback" not in said
    faulty.run("stopped")
    faulty.same("stopped", "whole")


def test_a_second_driver_is_refused_with_the_first_ones_id(faulty: Faulty) -> None:
    first = faulty.start("twice")
    until(lambda: faulty.lines("twice") >= 4, 150)
    said = faulty.finish(faulty.start("twice"), 2)
    assert "is written by attempt 1 (by hand, " in said
    assert f"process {first.pid})" in said
    assert len(faulty.events("twice", "began")) == 1
    faulty.finish(first)
    faulty.same("twice", "whole")
