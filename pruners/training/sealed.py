"""States of interrupted runs: written behind their SHA-256, since torch checks nothing it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DIGEST = 32
"""Bytes of a SHA-256."""


def save_sealed(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values."""
    with path.open("w+b") as file:
        file.write(bytes(DIGEST))
        torch.save(state, file)
        file.seek(DIGEST)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        file.write(digest)


def load_sealed(path: Path, device: torch.device) -> Any:
    """Read what `save_sealed` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    with path.open("rb") as file:
        digest = file.read(DIGEST)
        if hashlib.file_digest(file, "sha256").digest() != digest:
            raise ValueError(f"{path} is damaged; remove it, and the run starts again")
        file.seek(DIGEST)
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # torch and its unpickler raise what comes
            raise ValueError(f"{path} is no state; remove it, and the run starts again") from error
