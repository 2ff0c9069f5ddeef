from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient

from search.records.digests import directory_digest
from search.records.front import build_front
from search.records.journal import Journal
from search.records.trial_record import TrialRecord
from search.sweep.spec import alias_of
from search.tracking import tracker as tracker_module
from search.tracking.registry import Registration
from search.tracking.runs import SweepRuns
from search.tracking.served import Served
from search.tracking.tracker import Tracker
from tests.search.records import test_files
from tests.search.records.test_files import record
from tests.search.tracking.test_runs import SHAPE, TINY_SHAPE, asked, log, tracked
from tests.search.tracking.test_tracker import flaky

DENSE = dataclasses.replace(test_files.DENSE, shape=SHAPE, test_top1=79.0)
DIGESTS = {"model": "aa", "data.train": "tt", "data.val": "vv", "data.test": "ee"}


class World:
    """A store, and sweeps that register there. Their models are a few random bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(tracking_uri=self.uri)
        self.names = (f"sweep-{number}" for number in itertools.count())

    def sweep(self, *members: tuple[float, float], **more: Any) -> Sweep:
        """Return a new sweep whose front's members have these costs and accuracies."""
        return Sweep(self, next(self.names), members, more)


class Sweep:
    def __init__(
        self, world: World, name: str, members: tuple[tuple[float, float], ...], more: dict
    ) -> None:
        self.world, self.name, self.directory = world, name, world.folder / name
        self.directory.mkdir()
        world.client.create_experiment(name, (self.directory / "artifacts").as_uri())
        self.members = [
            record(f"{number:04d}", cost, top1, shape=SHAPE, test_top1=top1 - 1.0)
            for number, (cost, top1) in enumerate(members, 1)
        ]
        self.served = {member.trial: self.model(member) for member in self.members}
        self.dense, self.given = more.pop("dense", DENSE), {"model": name, **more}
        self.runs = self.opened()
        log(self.runs, [asked(r) for r in self.records])

    @property
    def records(self) -> list[TrialRecord]:
        return [self.dense, *self.members]

    def model(self, member: TrialRecord) -> Served:
        directory = self.directory / "served" / member.trial
        (directory / "extra_files").mkdir(parents=True)
        (directory / "MLmodel").write_text(member.trial)
        (directory / "extra_files" / "model.safetensors").write_bytes(os.urandom(1000))
        digest = directory_digest(directory)
        return Served(
            trial=member.trial, directory=directory, digest=digest, difference=2e-6, reason=""
        )

    def opened(self) -> SweepRuns:
        """As a driver that starts, or starts again."""
        return SweepRuns.open(tracked(self.directory, self.world.uri), TINY_SHAPE)

    def registration(self) -> Registration:
        given: dict[str, Any] = {"digests": DIGESTS, "budgets": (0.25, 0.5, 0.75), "failed": {}}
        front = build_front(self.records, "effective_gmacs")
        given |= {"served": self.served, **self.given}
        return Registration(sweep=self.name, front=front, **given)

    def register(self) -> Registration:
        registration = self.registration()
        for step in registration.steps():
            step(self.runs)
        return registration

    def check(self) -> None:
        """Check that every member is there once and whole, and that all is linked."""
        client, model = self.world.client, self.given["model"]
        versions = client.search_model_versions(f"name = '{model}'")
        versions = [one for one in versions if one.tags["sweep"] == self.name]
        assert sorted(one.tags["trial"] for one in versions) == [m.trial for m in self.members]
        models = client.search_logged_models([self.runs.experiment])
        assert {one.source_run_id for one in models} == {one.run_id for one in versions}
        assert len(models) == len(versions)
        for version in versions:
            run = client.get_run(version.run_id)
            (logged,) = [one for one in models if one.source_run_id == version.run_id]
            assert (logged.status, logged.artifact_location) == ("READY", version.source)
            assert [one.model_id for one in run.outputs.model_outputs] == [logged.model_id]
            (link,) = json.loads(logged.tags["mlflow.modelVersions"])
            assert (link["name"], str(link["version"])) == (model, str(version.version))
            stored = download_artifacts(artifact_uri=version.source, tracking_uri=self.world.uri)
            assert directory_digest(Path(stored)) == version.tags["digest"]
            assert run.data.tags["trial"] == version.tags["trial"] == logged.name
            assert {f.path for f in client.list_artifacts(version.run_id)} == {"plan.json"}

    def aliases(self) -> dict[str, tuple[str, str]]:
        """Alias -> sweep and trial."""
        client, name = self.world.client, self.given["model"]
        found = client.get_registered_model(name).aliases
        tags = {
            alias: client.get_model_version(name, version).tags for alias, version in found.items()
        }
        return {alias: (one["sweep"], one["trial"]) for alias, one in tags.items()}


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
