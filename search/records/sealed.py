"""JSON files that hold their own digest, so that a torn or changed one is never taken for whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.digests import json_digest

DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading such a file and taking it apart raises where it is not what was written."""


def sealed(values: Mapping[str, Any]) -> str:
    """Return the text of such a file."""
    return json.dumps({**values, "digest": json_digest(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what such a file holds, without the digest.

    Raises:
        DAMAGE: Any of these, if the file is absent or not what was written.
    """
    values: dict[str, Any] = json.loads(path.read_text())
    if values.pop("digest") != json_digest(values):
        raise ValueError(f"{path} is not what was written: its digest is another one")
    return values
