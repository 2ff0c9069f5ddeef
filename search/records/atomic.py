"""What happens when a sweep's directory cannot be written to: the sweep stops, by name."""

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
