"""Errors of writing to a sweep's directory, which stop the sweep and name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.sweep.spec import SweepFailedError


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Stop a sweep whose directory cannot be written to.

    Raises:
        SweepFailedError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SweepFailedError(
            f"{directory} cannot be written to: {error.strerror or error}; nothing that was "
            "finished is lost: mend it and run the same command again"
        ) from error
