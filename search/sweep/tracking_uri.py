"""Tracking stores in a SQLite file: the file's path, and the folder of artifacts."""

from __future__ import annotations

from pathlib import Path

SQLITE = "sqlite:///"
"""Prefix of the tracking URI of a SQLite file."""


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the file that a tracking URI names; None if it names none."""
    return Path(uri.removeprefix(SQLITE)).resolve() if uri.startswith(SQLITE) else None


def artifacts_beside(uri: str) -> str | None:
    """Return the artifact location of a new experiment; None leaves it to the store.

    A server knows where. For a SQLite file MLflow would take `mlruns` below whatever directory the
    process happens to run in, which for a Ray job is gone once the job ends.

    Args:
        uri: Tracking URI.
    """
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()
