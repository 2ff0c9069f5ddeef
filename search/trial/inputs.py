"""Inputs of all trials of a sweep, in a form that Ray keeps once per node.

Ray hands numpy arrays out of its object store without a copy; torch's tensors it would copy into
every process.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruners import PrunableViT
from search.sweep.spec import Sweep


@dataclass(frozen=True, kw_only=True)
class TrialInputs:
    """Inputs of all trials of a sweep; Ray keeps them once per node, weights included.

    Attributes:
        sweep: The sweep.
        dense: The dense model, on the CPU; its weights must not be changed in place.
        start: The model that plans cut, of the same shape: the dense one, or the dense one tuned
            for cuts.
        directory: The sweep's, which all nodes see under this path.
        attempt: Number of the driver's lease; after a later one has begun, nothing is saved.
        fingerprint: Digests of what the sweep began with; a missing key is not looked at.
    """

    sweep: Sweep
    dense: PrunableViT
    start: PrunableViT
    directory: Path
    attempt: int = 0
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights in a way that they are not copied into each process."""
        start = None if self.start is self.dense else pack(self.start)
        others = {"attempt": self.attempt, "fingerprint": self.fingerprint}
        return _inputs, (self.sweep, pack(self.dense), start, self.directory, others)


def _inputs(
    sweep: Sweep, dense: Apart, start: Apart | None, directory: Path, others: Mapping[str, Any]
) -> TrialInputs:
    whole = unpack(*dense)
    begin = unpack(*start) if start else whole
    return TrialInputs(sweep=sweep, dense=whole, start=begin, directory=directory, **others)


class Packed(NamedTuple):
    """A tensor as bytes, which stay where they are when a process reads them."""

    content: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


Apart = tuple[PrunableViT, dict[str, Packed]]
"""A model without its weights, and these."""


def pack(vit: PrunableViT) -> Apart:
    """Take a model on the CPU apart: the model without its weights, and these."""
    weights = {name: _pack(tensor) for name, tensor in vit.state_dict().items()}
    return copy.deepcopy(vit).to("meta"), weights


def unpack(bare: PrunableViT, weights: dict[str, Packed]) -> PrunableViT:
    """Put a model together again; where the weights' memory is read-only they must not change."""
    bare.load_state_dict({name: _unpack(packed) for name, packed in weights.items()}, assign=True)
    if missing := [name for name, buffer in bare.named_buffers() if buffer.is_meta]:
        raise AssertionError(f"{missing[0]} is no part of a model's state, so it was lost")
    return bare


def _pack(tensor: Tensor) -> Packed:
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return Packed(content, tensor.dtype, tuple(tensor.shape))


def _unpack(packed: Packed) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(packed.content).view(packed.dtype).view(packed.shape)
