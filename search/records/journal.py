"""Lines of JSON that are only ever appended: adding one costs the same however many there are."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from search.records.typed import JsonObject

CHECK = "crc32"
"""Key of a line's checksum, its last."""


class Journal:
    """A file of JSON objects, one per line, each with a checksum.

    A process may be killed while it writes a line: what follows the last line's end is no line. It
    is not read, and is cut off before the next one is written. One process writes; others may read.
    """

    def __init__(self, path: Path, may_write: Callable[[], None] = lambda: None) -> None:
        """Use a file that need not exist.

        Args:
            path: The file.
            may_write: Asked before a line is added; it raises an error if this must not be.
        """
        self.path, self.may_write = path, may_write
        self._writable = False  # until what is no line is cut off

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        self.may_write()
        if not self._writable and self.path.exists():
            os.truncate(self.path, _whole(self.path.read_bytes()))
        self._writable = False  # where a line is cut short, the disk being full
        with self.path.open("ab") as file:
            file.write(_line(values))
        self._writable = True

    def read(self) -> list[JsonObject]:
        """Return all lines.

        Raises:
            ValueError: If a line is not what was written.
        """
        return [values for values, _ in self.read_from(0)]

    def read_from(self, start: int) -> list[tuple[JsonObject, int]]:
        """Return the lines behind a place, each with the place behind it.

        Args:
            start: 0, or a place that was returned.

        Raises:
            ValueError: If a line is not what was written.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read()
        lines = content[: _whole(content)].splitlines(keepends=True)
        ends = itertools.accumulate((len(line) for line in lines), initial=start)
        next(ends)
        return [(self._parsed(line), end) for line, end in zip(lines, ends, strict=True)]

    def _parsed(self, line: bytes) -> JsonObject:
        try:
            values: JsonObject = json.loads(line)
            del values[CHECK]
            sound = _line(values) == line
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"{self.path} is damaged at {_shown(line)}; put back a copy of it, "
                "or move its directory away to start anew"
            )
        return values


def _line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values)
    check = f"{zlib.crc32(text.encode()):08x}"
    separator = ", " if values else ""
    return f'{text[:-1]}{separator}"{CHECK}": "{check}"}}\n'.encode()


def _whole(content: bytes) -> int:
    """Bytes of whole lines."""
    return content.rfind(b"\n") + 1


def _shown(line: bytes) -> str:
    return repr(line[:40].decode(errors="replace"))
