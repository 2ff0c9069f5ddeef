"""SHA-256 of files, tensors and settings, and JSON files that hold their own.

A torn or changed file is never taken for whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from search.records.typed import JsonObject

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


def file_digest(path: Path) -> str:
    """Return the digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(values: Mapping[str, Any]) -> str:
    """Return the digest of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of named tensors, wherever they lie."""
    whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    return hashlib.sha256(save(whole)).hexdigest()


def directory_digest(path: Path) -> str:
    """Return the digest of all files below a directory, names included."""
    files = (file for file in path.rglob("*") if file.is_file())
    return json_digest({file.relative_to(path).as_posix(): file_digest(file) for file in files})


def sealed(values: Mapping[str, Any]) -> str:
    """Return the text of such a file."""
    return json.dumps({**values, "digest": json_digest(values)})


def read_sealed(path: Path) -> JsonObject:
    """Return what such a file holds, without the digest.

    Raises:
        DAMAGE: Any of these, if the file is absent or not what was written.
    """
    values: JsonObject = json.loads(path.read_text())
    if values.pop("digest") != json_digest(values):
        raise ValueError(f"{path} is not what was written: its digest is another one")
    return values
