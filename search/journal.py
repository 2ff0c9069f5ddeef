"""Lines of JSON that are only ever appended: adding one costs the same however many there are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON objects, one per line.

    A process may be killed while it writes a line: what follows the last line's end is no line. It
    is not read, and is cut off before the next one is written.
    """

    def __init__(self, path: Path) -> None:
        """Use a file that need not exist."""
        self.path = path
        self._size: int | None = None  # unknown until the file is looked at

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        if self._size is None:
            self.cut(self.size)
        line = json.dumps(values).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
        self._size = self.size + len(line)

    def read(self) -> list[dict[str, Any]]:
        """Return all lines."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return [json.loads(line) for line in content[: self.size].splitlines()]

    @property
    def size(self) -> int:
        """Bytes of all whole lines."""
        if self._size is None:
            content = self.path.read_bytes() if self.path.exists() else b""
            self._size = content.rfind(b"\n") + 1
        return self._size

    def cut(self, size: int) -> None:
        """Go back to what `size` was once.

        Raises:
            ValueError: If the file was never as large.
        """
        if size > self.size:
            raise ValueError(f"{self.path} has {self.size} bytes; {size} are needed")
        if self.path.exists():
            os.truncate(self.path, size)
        self._size = size
