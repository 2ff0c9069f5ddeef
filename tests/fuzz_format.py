"""What a fuzz test needs to know of a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import Random


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format.

    Attributes:
        path: File that a reader finds; it holds a valid sample at first.
        damage: Returns a damaged sample.
        read: Reads the file, and all of it that anybody uses.
        named: What an error names: the file, or what stands for it.
    """

    path: Path
    damage: Callable[[Random], bytes]
    read: Callable[[], object]
    named: str


def either(*ways: Callable[[Random], bytes]) -> Callable[[Random], bytes]:
    """Damage in one of several ways."""
    return lambda random: ways[random.integers(len(ways))](random)
