"""MLflow's model registry: each member of a sweep's front is a version of a registered model.

Each step looks first whether it was carried out, so that all of them may be retried: after a lost
answer, and by a driver that resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search.records.front import Front, cost_of_record, cost_ratio
from search.records.trial_record import TrialRecord
from search.sweep.spec import alias_of
from search.tracking.runs import SweepRuns
from search.tracking.served import Served

VERIFIED, REASON, DIFFERENCE = "verified", "reason", "difference"
"""Tags of a version: whether its logits are PyTorch's, why not, the largest difference."""

DIGEST = "digest"
"""Tag of a version: the SHA-256 of its files, as they were verified."""

VAL_DIGEST = "data.val"
"""Tag of a version: the SHA-256 of the validation images, as the ledger has it."""

NOT_REGISTERED = "not_registered"
"""Tag of a trial's run: reason why a member of the front is not registered."""

_VERSIONS = "mlflow.modelVersions"  # by this tag of a logged model MLflow's pages find its versions


@dataclass(frozen=True, kw_only=True)
class Registration:
    """The registration of a sweep's front.

    Attributes:
        model: Name of the registered model; sweeps may share one.
        sweep: Name of the sweep.
        front: The final front.
        served: Trial -> its MLflow model.
        failed: Trial -> reason why it has none.
        digests: SHA-256 of the dense model and of each split, by the sweep's keys.
        budgets: Shares of the dense model's cost, each of which has an alias.
        versions: Trial -> version, of those that are registered.
        aliases: Alias -> version that it names now, of those of the budgets.
    """

    model: str
    sweep: str
    front: Front
    served: Mapping[str, Served]
    failed: Mapping[str, str]
    digests: Mapping[str, str]
    budgets: tuple[float, ...]
    versions: dict[str, ModelVersion] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def steps(self) -> list[Callable[[SweepRuns], None]]:
        """Return the steps of the registration, in order; they follow the logging of the front."""
        steps: list[Callable[[SweepRuns], None]] = []
        steps += [partial(self._leave_out, trial, why) for trial, why in self.failed.items()]
        if members := [m for m in self.front.members if m.trial in self.served]:
            steps += [*(partial(self._register, member) for member in members), self._point]
        return steps

    def lines(self) -> list[str]:
        """Return the versions, their aliases and the failures, in lines for a person."""
        lines = [f"trial {trial} is not registered: {why}" for trial, why in self.failed.items()]
        numbers = {trial: version.version for trial, version in self.versions.items()}
        for trial, number in numbers.items():
            if reason := self.versions[trial].tags[REASON]:
                lines.append(f"version {number} (trial {trial}) is not verified: {reason}")
        if numbers:
            named = "".join(f"; {alias} is {version}" for alias, version in self.aliases.items())
            trials = ", ".join(f"{number} ({trial})" for trial, number in numbers.items())
            lines.append(f"registered as versions of {self.model}: {trials}{named}")
        return lines

    def _leave_out(self, trial: str, why: str, runs: SweepRuns) -> None:
        runs.client.set_tag(runs.trials[trial], NOT_REGISTERED, why)

    def _register(self, member: TrialRecord, runs: SweepRuns) -> None:
        """Make a member a version of the registered model, once."""
        client, run = runs.client, runs.trials[member.trial]
        version = find_version(client, self.model, run)
        if version is None:
            tags = self._tags(member)
            logged = _logged_model(client, runs.experiment, run, member.trial, tags)
            _upload(client, logged, self.served[member.trial].directory)
            _link_run(client, run, logged.model_id)
            _make_registered_model(client, self.model)
            version = client.create_model_version(
                self.model,
                # Not "models:/<id>": MLflow's SQL store looks for that in another store, the
                # process's own, where this one is not.
                source=logged.artifact_location,
                run_id=run,
                tags={**tags, "model_id": logged.model_id},
                description=self._description(member),
                await_creation_for=0,  # it is there
                model_id=logged.model_id,
            )
        _link_version(client, version)
        self.versions[member.trial] = version

    def _point(self, runs: SweepRuns) -> None:
        """Let `best-under-<budget>` name the most accurate version within each budget.

        That is the member of this front with the highest validation top-1 whose export was verified
        and that costs at most this share of the dense model's cost, as the sweep measures cost. A
        version of another sweep keeps an alias only if its own top-1 is higher, on the same
        validation images, at a cost within the budget as well. Without such a member an alias
        stays where it is. No other alias is touched.
        """
        client = runs.client
        held = client.get_registered_model(self.model).aliases
        for budget in self.budgets:
            alias, best = alias_of(budget), self.best_under(budget)
            if best is None:
                continue
            if alias in held:
                holder = client.get_model_version(self.model, held[alias])
                if self._stays(holder.tags, best, budget):
                    self.aliases[alias] = str(holder.version)
                    continue
            self.aliases[alias] = str(self.versions[best.trial].version)
            client.set_registered_model_alias(self.model, alias, self.aliases[alias])

    def best_under(self, budget: float) -> TrialRecord | None:
        """Return the most accurate verified member that costs at most this share."""
        within = [
            member
            for member in self.front.members
            if member.trial in self.versions
            and self.versions[member.trial].tags[VERIFIED] == "true"
            and cost_ratio(self.front, member) <= budget
        ]
        return max(within, key=lambda member: member.val_top1 or 0.0, default=None)

    def _stays(self, tags: Mapping[str, str], best: TrialRecord, budget: float) -> bool:
        """Whether the version with these tags keeps the alias of a budget."""
        dense, cost = self.front.dense, self.front.cost
        try:
            top1, own = float(tags["val_top1"]), float(tags[_cost_key(cost)])
        except (KeyError, ValueError):  # not a version of a sweep
            return False
        return (
            tags.get(VAL_DIGEST) == self.digests[VAL_DIGEST]
            and tags.get(VERIFIED) == "true"
            and own <= budget * cost_of_record(dense, cost)
            and top1 > (best.val_top1 or 0.0)
        )

    def _tags(self, member: TrialRecord) -> dict[str, str]:
        served = self.served[member.trial]
        numbers = {
            key: getattr(member, key)
            for key in (
                "val_top1",
                "test_top1",
                "gmacs",
                "effective_gmacs",
                "latency_ms",
                "params",
                "density",
            )
        }
        numbers |= {"cost_ratio": cost_ratio(self.front, member), DIFFERENCE: served.difference}
        return {
            "sweep": self.sweep,
            "trial": member.trial,
            "front": "true",
            "cost": self.front.cost,
            **{key: repr(value) for key, value in numbers.items() if value is not None},
            **self.digests,
            "plan": member.plan_line,
            VERIFIED: "true" if served.verified else "false",
            REASON: served.reason,
            DIGEST: served.digest,
        }

    def _description(self, member: TrialRecord) -> str:
        """Describe a version in Markdown."""
        served, test = self.served[member.trial], ""
        if member.test_top1 is not None:
            test = f", test top-1 {member.test_top1:.1f} %"
        checked = served.reason or (
            f"its logits in onnxruntime are at most {served.difference:.1e} from PyTorch's"
        )
        return "\n".join(
            (
                f"Trial {member.trial} of sweep {self.sweep}: validation top-1 "
                f"{member.val_top1:.1f} %{test}, {cost_ratio(self.front, member):.2f}x the dense "
                f"model's {self.front.cost}.",
                "",
                "| GMACs | effective GMACs | parameters | density |",
                "|---|---|---|---|",
                f"| {member.gmacs:.4g} | {member.effective_gmacs:.4g} | {member.params:,} "
                f"| {member.density:.2f} |",
                "",
                f"Plan: {member.plan_line}",
                "",
                f"{'Verified' if served.verified else 'Not verified'}: {checked}.",
                "",
                "Input: images [B, channels, height, width] in float32, normalised by `mean` and "
                "`std` of the model's metadata. `extra_files` opens with `PrunableViT.load`.",
            )
        )


def find_version(client: MlflowClient, model: str, run: str) -> ModelVersion | None:
    """Return a run's version of a registered model; None without one."""
    found = client.search_model_versions(f"name = '{model}' AND run_id = '{run}'")
    ours = [version for version in found if DIGEST in version.tags]
    return min(ours, key=lambda version: int(version.version), default=None)


def _cost_key(cost: str) -> str:
    return "latency_ms" if cost == "latency" else cost


def _logged_model(
    client: MlflowClient, experiment: str, run: str, trial: str, tags: Mapping[str, str]
) -> LoggedModel:
    """Return the logged model of a trial's files: one of the same digest, or a new one."""
    of_run = f"source_run_id = '{run}' AND tags.{DIGEST} = '{tags[DIGEST]}'"
    if found := client.search_logged_models([experiment], of_run, max_results=1):
        return found[0]
    return client.create_logged_model(
        experiment, name=trial, source_run_id=run, tags=dict(tags), model_type="front"
    )


def _upload(client: MlflowClient, logged: LoggedModel, directory: Path) -> None:
    """Upload the files that are not there yet; each is there whole or not at all."""
    if logged.status == LoggedModelStatus.READY:
        return
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        place = file.relative_to(directory)
        folder = None if place.parent == Path() else place.parent.as_posix()
        there = client.list_logged_model_artifacts(logged.model_id, folder)
        sizes = {known.path: known.file_size for known in there}
        if sizes.get(place.as_posix()) != file.stat().st_size:
            client.log_model_artifact(logged.model_id, str(file), folder)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def _link_run(client: MlflowClient, run: str, model_id: str) -> None:
    """Show a logged model on the page of its run."""
    outputs: Any = client.get_run(run).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs else set()
    if model_id not in known:
        client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])


def _link_version(client: MlflowClient, version: ModelVersion) -> None:
    """Show a version on the page of its logged model."""
    model_id = version.tags["model_id"]
    known = json.loads(client.get_logged_model(model_id).tags.get(_VERSIONS, "[]"))
    if not any(str(one["version"]) == str(version.version) for one in known):
        known.append({"name": version.name, "version": version.version})
        client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps(known)})


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
