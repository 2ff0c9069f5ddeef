"""A model that all processes of a node read from the same memory.

Ray hands numpy arrays out of its object store without a copy; torch's tensors it would copy into
every process.
"""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruners import PrunableViT


class Packed(NamedTuple):
    """A tensor as bytes, which stay where they are when a process reads them."""

    content: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(vit: PrunableViT) -> tuple[PrunableViT, dict[str, Packed]]:
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
