"""SHA-256 of files, tensors and settings: what says whether something is what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


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
