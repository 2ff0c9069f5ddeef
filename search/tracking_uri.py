"""Where the artifacts of a tracking store go that is a file, not a server."""

from __future__ import annotations

from pathlib import Path

SQLITE = "sqlite:///"
"""What the tracking URI of a SQLite file begins with."""


def artifacts_beside(uri: str) -> str | None:
    """Return where a new experiment keeps its artifacts; None leaves it to the store.

    A server knows where. For a SQLite file MLflow would take `mlruns` below whatever directory the
    process happens to run in, which for a Ray job is gone once the job ends.

    Args:
        uri: Tracking URI.
    """
    if not uri.startswith(SQLITE):
        return None
    return (Path(uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts").as_uri()
