"""A store of MLflow's, and sweeps that register there."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient

from search.records.digests import directory_digest
from search.records.front import build_front
from search.records.trial_record import TrialRecord
from search.tracking.registry import Registration
from search.tracking.runs import SweepRuns
from search.tracking.served import Served
from tests.search import trial_records
from tests.search.logged import SHAPE, TINY_SHAPE, asked, log, tracked
from tests.search.trial_records import record

DENSE = dataclasses.replace(trial_records.DENSE, shape=SHAPE, test_top1=79.0)
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
