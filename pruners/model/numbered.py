"""Which part of a dense model is left in one that was cut.

Surgery selects rows and columns; so a copy whose parameters hold their own positions, cut in the
same way, says where each parameter that is left came from. What a cut does inside need not be
known.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pruners.model.vit import ViT


def numbered(dense: ViT) -> ViT:
    """Copy a model; each parameter holds 1, 2, ... in float64, exact up to 2^53."""
    memo: dict[int, object] = {}
    for parameter in dense.parameters():
        count = parameter.numel()
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device=parameter.device)
        memo[id(parameter)] = nn.Parameter(numbers.view(parameter.shape), requires_grad=False)
    return copy.deepcopy(dense, memo)


def positions_of(numbers: Tensor) -> Tensor:
    """Return positions from 0, [...], of numbers [...]; those of zeros are 0 too."""
    return (numbers.detach().long() - 1).clamp_min_(0)


def query_rows(cut: ViT, dense: ViT) -> list[Tensor]:
    """Return for each block of a numbered model, cut, which q row of the dense one each is.

    Args:
        cut: The numbered model.
        dense: The model it was numbered after, uncut.

    Returns:
        Per block [H', K'], positions among the rows of the dense block's qkv; -1 in the padding of
        heads of different sizes. Empty without attention.
    """
    found = []
    for block, whole in zip(cut.blocks, dense.blocks, strict=True):
        if block.attn is None or whole.attn is None:
            found.append(torch.empty(0, 0, dtype=torch.long))
            continue
        attn = block.attn
        numbers = attn.qkv.weight[: attn.heads * attn.qk_dim, 0]
        rows = positions_of(numbers) // whole.attn.qkv.in_features
        rows = rows.masked_fill(numbers == 0.0, -1)
        found.append(rows.view(attn.heads, attn.qk_dim))
    return found
