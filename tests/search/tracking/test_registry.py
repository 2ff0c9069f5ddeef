from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from search.records.journal import Journal
from search.sweep.spec import alias_of
from search.tracking import tracker as tracker_module
from search.tracking.tracker import Tracker
from tests.search.flaky import flaky
from tests.search.store import DENSE, DIGESTS, Sweep, World

pytestmark = pytest.mark.slow  # stores of MLflow are opened for real


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("store"))


THREE = ((0.2, 50.0), (0.45, 60.0), (0.7, 70.0))


def test_each_member_is_a_version_that_says_what_it_is(world: World) -> None:
    sweep = world.sweep(*THREE)
    registration = sweep.register()
    sweep.check()
    numbers = {trial: str(version.version) for trial, version in registration.versions.items()}
    assert numbers == {"0001": "1", "0002": "2", "0003": "3"}
    version = world.client.get_model_version(sweep.name, "2")
    served = sweep.served["0002"]
    assert version.tags == {
        **DIGESTS,
        "sweep": sweep.name,
        "trial": "0002",
        "front": "true",
        "cost": "effective_gmacs",
        "cost_ratio": "0.45",
        "val_top1": "60.0",
        "test_top1": "59.0",
        "gmacs": "0.9",
        "effective_gmacs": "0.45",
        "params": "1000",
        "density": "0.5",
        "plan": "grouped: neurons -50 %",
        "verified": "true",
        "reason": "",
        "difference": "2e-06",
        "digest": served.digest,
        "model_id": version.source.split("/")[-2],
    }
    assert "validation top-1 60.0 %, test top-1 59.0 %, 0.45x the dense" in version.description
    assert "Plan: grouped: neurons -50 %" in version.description
    assert registration.lines() == [
        f"registered as versions of {sweep.name}: 1 (0001), 2 (0002), 3 (0003); "
        "best-under-25 is 1; best-under-50 is 2; best-under-75 is 3"
    ]


def test_registering_again_changes_nothing(world: World) -> None:
    sweep = world.sweep(*THREE)
    first = sweep.register()
    uploads: list[str] = []
    sweep.runs = sweep.opened()
    sweep.runs.client.log_model_artifact = lambda *args: uploads.append(args)  # type: ignore[method-assign]
    again = sweep.register()
    assert again.lines() == first.lines()
    assert uploads == []
    sweep.check()


class DiedError(Exception):
    pass


class Mortal:
    """A client with which a driver dies at a call: before it is done, or after."""

    def __init__(self, client: MlflowClient, left: float, *, after: bool) -> None:
        self.client, self.left, self.after, self.calls = client, left, after, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls > self.left and not self.after:
                raise DiedError
            answer = getattr(self.client, name)(*args, **more)
            if self.calls > self.left:
                raise DiedError
            return answer

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_driver_may_die_at_any_call(after: bool, world: World) -> None:
    died = 0
    for left in itertools.count():
        sweep = world.sweep((0.45, 60.0), budgets=(0.5,))
        sweep.runs.client = Mortal(sweep.runs.client, left, after=after)  # type: ignore[assignment]
        try:
            sweep.register()
        except DiedError:
            died += 1
        else:
            break
        sweep.runs = sweep.opened()
        sweep.register()
        sweep.check()
        assert sweep.aliases() == {"best-under-50": (sweep.name, "0001")}
    assert died > 15


def test_an_upload_that_broke_off_goes_on(world: World) -> None:
    sweep = world.sweep((0.2, 50.0))
    sent: list[str] = []
    upload = sweep.runs.client.log_model_artifact

    def breaks(model_id: str, path: str, folder: str | None) -> None:
        sent.append(Path(path).name)
        if len(sent) == 2:
            raise OSError("broken pipe")
        upload(model_id, path, folder)

    sweep.runs.client.log_model_artifact = breaks  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken pipe"):
        sweep.register()
    sweep.register()
    assert sent == ["MLmodel", "model.safetensors", "model.safetensors"]
    sweep.check()


@pytest.mark.parametrize("after", [False, True])
def test_what_mlflow_refuses_is_tried_again(
    after: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "POLL_S"):
        monkeypatch.setattr(tracker_module, name, 0.001)
    sweep = world.sweep(*THREE)
    client = sweep.runs.client
    for method in (
        *("create_registered_model", "create_logged_model", "log_model_artifact"),
        *("finalize_logged_model", "log_outputs", "create_model_version"),
        *("set_logged_model_tags", "set_registered_model_alias", "search_model_versions"),
    ):
        setattr(client, method, flaky(getattr(client, method), after=after))
    tracker = Tracker(sweep.runs, Journal(sweep.directory / "ledger.jsonl"))
    registration = sweep.registration()
    tracker.finish(registration.front, sweep.records, registration.steps(), seconds=30.0)
    tracker.close()
    sweep.check()
    assert len(sweep.aliases()) == 3


def test_an_alias_names_the_most_accurate_within_its_budget(world: World) -> None:
    members = ((0.2, 50.0), (0.3, 55.0), (0.5, 60.0))
    sweep = world.sweep(*members, budgets=(0.1, 0.3, 0.5, 0.9))
    sweep.register()
    assert sweep.aliases() == {  # none costs 0.1 of the dense model
        "best-under-30": (sweep.name, "0002"),
        "best-under-50": (sweep.name, "0003"),
        "best-under-90": (sweep.name, "0003"),
    }


@pytest.mark.parametrize(
    ("budget", "alias"),
    [
        (0.5, "best-under-50"),
        (0.07, "best-under-7"),
        (0.125, "best-under-12-5"),
        (0.29, "best-under-29"),
    ],
)
def test_aliases_have_names_that_mlflow_takes(budget: float, alias: str) -> None:
    assert alias_of(budget) == alias


FAR = "its logits in onnxruntime are far from PyTorch's"


def unverified(sweep: Sweep, trial: str) -> None:
    sweep.served[trial] = dataclasses.replace(sweep.served[trial], difference=0.02, reason=FAR)


def test_what_is_not_verified_is_registered_as_that_and_has_no_alias(world: World) -> None:
    sweep = world.sweep((0.2, 50.0), (0.45, 60.0), budgets=(0.5,))
    unverified(sweep, "0002")
    registration = sweep.register()
    sweep.check()
    version = world.client.get_model_version(sweep.name, "2")
    assert (version.tags["verified"], version.tags["reason"]) == ("false", FAR)
    assert f"Not verified: {FAR}." in version.description
    assert sweep.aliases() == {"best-under-50": (sweep.name, "0001")}
    assert registration.lines()[0] == f"version 2 (trial 0002) is not verified: {FAR}"


def test_what_could_not_be_exported_is_left_out_by_name(world: World) -> None:
    sweep = world.sweep((0.2, 50.0), (0.45, 60.0), budgets=(0.5,), failed={"0002": "too large"})
    del sweep.served["0002"]
    registration = sweep.register()
    assert registration.lines()[0] == "trial 0002 is not registered: too large"
    run = world.client.get_run(sweep.runs.trials["0002"])
    assert run.data.tags["not_registered"] == "too large"
    sweep.members.pop()
    sweep.check()
    assert sweep.aliases() == {"best-under-50": (sweep.name, "0001")}


def test_a_front_without_members_registers_nothing(world: World) -> None:
    sweep = world.sweep()
    assert sweep.registration().steps() == []
    assert sweep.register().lines() == []


CHEAPER = dataclasses.replace(DENSE, effective_gmacs=0.8)


@pytest.mark.parametrize(
    ("second", "more", "moves"),
    [
        ((0.4, 59.9), {}, False),
        ((0.4, 60.0), {}, True),  # as good, and later
        ((0.4, 10.0), {"digests": {**DIGESTS, "data.val": "others"}}, True),  # not to be compared
        ((0.4, 10.0), {"digests": {**DIGESTS, "model": "other"}}, False),
        ((0.3, 10.0), {"dense": CHEAPER}, True),  # half of its cost is less
        ((0.6, 90.0), {}, False),  # beyond the budget
    ],
)
def test_an_alias_moves_to_a_later_sweep_unless_the_holder_is_better(
    second: tuple[float, float], more: dict, moves: bool, world: World
) -> None:
    first = world.sweep((0.45, 60.0), budgets=(0.5,))
    first.register()
    world.client.set_registered_model_alias(first.name, "approved", "1")
    later = world.sweep(second, budgets=(0.5,), model=first.name, **more)
    registration = later.register()
    holder = (later.name if moves else first.name, "0001")
    assert first.aliases() == {"best-under-50": holder, "approved": (first.name, "0001")}
    assert registration.aliases.get("best-under-50", "1") == ("2" if moves else "1")
    first.check()
    later.check()


def test_an_alias_of_somebody_elses_version_moves(world: World) -> None:
    sweep = world.sweep((0.45, 60.0), budgets=(0.5,))
    world.client.create_registered_model(sweep.name)
    source = (world.folder / "elsewhere").as_uri()
    world.client.create_model_version(sweep.name, source, tags={"val_top1": "good"})
    world.client.set_registered_model_alias(sweep.name, "best-under-50", "1")
    sweep.register()
    assert sweep.aliases() == {"best-under-50": (sweep.name, "0001")}


def test_a_version_that_is_there_stays_what_it_is_though_its_model_was_made_again(
    world: World,
) -> None:
    """The driver died, and what it was to register has been removed since."""
    sweep = world.sweep((0.2, 50.0), (0.45, 60.0), budgets=(0.5,))
    unverified(sweep, "0002")
    sweep.register()
    shutil.rmtree(sweep.directory / "served")
    sweep.served = {member.trial: sweep.model(member) for member in sweep.members}
    sweep.register()
    sweep.check()
    assert sweep.aliases() == {"best-under-50": (sweep.name, "0001")}
