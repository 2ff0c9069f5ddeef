"""Addresses: the database of a sweep, the command that opens MLflow on it, its page there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from search.records.journal import Journal
from search.sweep.spec import Sweep
from search.sweep.tracking_uri import SQLITE
from search.tracking.run_ids import RUNS


def local_uri(directory: Path) -> str:
    """Return the tracking URI of the database in a sweep's directory."""
    return f"{SQLITE}{directory.resolve() / 'mlflow.db'}"


def ui_command(uri: str | None, directory: Path) -> str:
    """Return the command that opens the MLflow UI on a sweep, or the server's address."""
    if uri is not None and uri.startswith("http"):
        return uri
    here = os.path.relpath(Path(sys.executable).with_name("mlflow"))  # not everyone activates
    program = "mlflow" if shutil.which("mlflow") else here
    return f"{program} ui --backend-store-uri {uri or f'{SQLITE}{directory}/mlflow.db'}"


def page_address(sweep: Sweep) -> str:
    """Return the address of a logged sweep's parent run in the MLflow UI.

    Of a database, on MLflow's default port of this machine.
    """
    first = Journal(sweep.directory / RUNS).read()[0]
    here = sweep.tracking is None or not sweep.tracking.startswith("http")
    server = "http://127.0.0.1:5000" if here else str(sweep.tracking).rstrip("/")
    run = f"#/experiments/{first['experiment']}/runs/{first['parent']}"
    return f"{server}/{run}?workflowType=machine_learning"
