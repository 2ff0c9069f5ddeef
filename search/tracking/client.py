"""MLflow's client without output and retries of its own."""

from __future__ import annotations

import logging
import os

from mlflow.tracking import MlflowClient


def mlflow_client(uri: str) -> MlflowClient:
    """Return a client of a tracking store, whose registry is there as well.

    Raises:
        MlflowException: If it is a database that cannot be opened.
    """
    # The caller reports errors, in a line.
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # The caller retries, and looks first whether the request was carried out.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
