"""`python -m search promote`: a person approves a version of a registered model."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search.records.digests import directory_digest
from search.sweep.spec import PASSWORD
from search.tracking.addresses import local_uri
from search.tracking.client import first_line, mlflow_client
from search.tracking.registry import DIGEST, REASON, VERIFIED

APPROVED = "approved"
"""Alias of the version that a person has approved; no sweep touches it."""


def promote(model: str, version: str, tracking: str | None) -> list[str]:
    """Let `approved` name a version of a registered model, and return lines that describe it.

    Args:
        model: Name of the registered model.
        version: Number of the version.
        tracking: MLflow tracking URI, or the directory of a sweep that has none.

    Raises:
        ValueError: If the version's trial is not on the front of its sweep, if its export was not
            verified or is not what was verified, or if there is no such version.
    """
    uri = tracking_uri(tracking)
    name = f"version {version} of {model}"
    if not version.isdecimal():
        raise ValueError(f"{name}: give the number of a version, for example 3")
    try:
        client = mlflow_client(uri)
        found = client.get_model_version(model, version)
        _check(client, found, uri, name)
        client.set_registered_model_alias(model, APPROVED, version)
    except (MlflowException, OSError) as error:
        raise ValueError(f"{name} in {uri}: {first_line(error)}") from error
    serve = f"mlflow models serve -m models:/{model}@{APPROVED} --env-manager local --port 5001"
    tags = found.tags
    top1 = ", ".join(
        f"{split} {float(tags[key]):.1f} %"
        for split, key in (("validation", "val_top1"), ("test", "test_top1"))
    )
    cost = f"{float(tags['cost_ratio']):.2f}x the dense model's {tags['cost']}"
    return [
        f"approved {name}: trial {tags['trial']} of sweep {tags['sweep']}, {top1}, {cost}",
        f"serve it with: MLFLOW_TRACKING_URI={shlex.quote(uri)} {serve}",
    ]


def tracking_uri(given: str | None) -> str:
    """Return a tracking URI: as given, or that of a sweep's directory.

    Raises:
        ValueError: If none is given, or no sweep is there, or a password is in it.
    """
    if not given:
        raise ValueError(
            "MLFLOW_TRACKING_URI is not set; set it, or give --tracking: a server, a sweep's "
            "sqlite:///results/NAME/mlflow.db, or its directory"
        )
    if PASSWORD.search(given):
        raise ValueError(
            "--tracking holds a password; give it as MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    if "://" in given:
        return given
    if not (Path(given) / "mlflow.db").is_file():
        raise ValueError(
            f"--tracking is {given!r}, where no mlflow.db is; give a URI, or the directory of a "
            "sweep that was logged there"
        )
    return local_uri(Path(given))


def _check(client: MlflowClient, version: ModelVersion, uri: str, name: str) -> None:
    """Check that a version may be approved: on the front, verified, its files unchanged.

    Raises:
        ValueError: If it may not.
    """
    tags = version.tags
    if not version.run_id or DIGEST not in tags:
        raise ValueError(f"{name} was registered by no sweep; give one that was")
    run = client.get_run(version.run_id)
    if run.data.tags.get("front") != "true":
        raise ValueError(
            f"{name} is trial {tags['trial']}, which is not on the front of sweep "
            f"{tags['sweep']}; give a member of the front"
        )
    if tags.get(VERIFIED) != "true":
        raise ValueError(f"{name} is not verified: {tags.get(REASON)}; give one that is")
    with tempfile.TemporaryDirectory() as folder:
        here = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source, dst_path=folder, tracking_uri=uri
        )
        digest = directory_digest(Path(here))
    if digest != tags[DIGEST]:
        raise ValueError(
            f"{name} is not what was verified: its files have SHA-256 {digest[:12]}, and had "
            f"{tags[DIGEST][:12]}; give another version"
        )
