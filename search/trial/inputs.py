"""What all trials of a sweep share, in a form that Ray keeps once per node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruners import PrunableViT
from search.node_model import Packed, pack, unpack
from search.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class TrialInputs:
    """What all trials of a sweep share; Ray keeps it once per node, weights included.

    Attributes:
        sweep: The sweep.
        dense: The dense model, on the CPU; its weights must not be changed in place.
        start: The model that plans cut, of the same shape: the dense one, or the dense one tuned
            for cuts.
        directory: The sweep's, which all nodes see under this path.
        attempt: Number of the driver's lease; after a later one has begun, nothing is saved.
        identity: Digests of what the sweep began with; a key that is missing is not looked at.
    """

    sweep: Sweep
    dense: PrunableViT
    start: PrunableViT
    directory: Path
    attempt: int = 0
    identity: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights in a way that they are not copied into each process."""
        start = None if self.start is self.dense else pack(self.start)
        others = {"directory": self.directory, "attempt": self.attempt, "identity": self.identity}
        return _inputs, (self.sweep, pack(self.dense), start, others)


Apart = tuple[PrunableViT, dict[str, Packed]]
"""A model without its weights, and these."""


def _inputs(sweep: Sweep, dense: Apart, start: Apart | None, others: dict[str, Any]) -> TrialInputs:
    whole = unpack(*dense)
    begin = unpack(*start) if start else whole
    return TrialInputs(sweep=sweep, dense=whole, start=begin, **others)
