"""A limit on how long one piece of work may take, which holds whatever it hangs in."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ends_if_hung(path: Path, seconds: float) -> Iterator[None]:
    """End the process if what is inside takes longer, and leave a file that says where it hung.

    The watch is a thread of C, so it also ends what holds Python's lock. What ends in time, or
    fails by itself, leaves no file.

    Args:
        path: File for the stacks of all threads; its directory is made.
        seconds: Longest time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)


def has_hung(path: Path) -> bool:
    """Whether the file says so."""
    return path.exists() and path.stat().st_size > 0
