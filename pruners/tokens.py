"""Token reduction: fewer tokens flow on from a block.

Pure functions of tensors, and the interface of the modules that a token method puts between
attention and MLP.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn


class TokenReducer(nn.Module, abc.ABC):
    """Reduces the tokens of one block, between its attention and its MLP.

    Attributes:
        recipe: `{"method", "options", "share"}`, JSON values from which a saved model builds the
            reducer again.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        """Keep the recipe."""
        super().__init__()
        self.recipe = recipe

    @abc.abstractmethod
    def tokens_after(self, tokens: int) -> int:
        """Return how many tokens leave when `tokens` enter (prefix included), for every image."""

    @abc.abstractmethod
    def macs(self, tokens: int, heads: int, qk_dim: int, dim: int) -> int:
        """Return the multiply-adds per image that the reduction itself costs."""

    @abc.abstractmethod
    def forward(self, x: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Reduce.

        Args:
            x: [B, N, D], the residual stream after this block's attention.
            query: [B, H, N, K] of this block's attention.
            key: [B, H, N, K] of this block's attention.
            scale: Softmax scale of this block's attention.

        Returns:
            [B, M, D], M = `tokens_after(N)`.
        """


class KeepPatches(TokenReducer):
    """Keeps the tokens at fixed positions, the same of every image.

    Attributes:
        index: [M], positions among the tokens that enter, prefix tokens included.
    """

    index: Tensor

    def __init__(self, recipe: dict[str, Any], prefix_tokens: int, patches: int) -> None:
        """Keep the prefix tokens and the first `patches` patches until `keep` says which."""
        super().__init__(recipe)
        self.prefix_tokens = prefix_tokens
        self.register_buffer("index", torch.arange(prefix_tokens + patches))

    def keep(self, patches: Tensor) -> None:
        """Keep the patches at the given positions, ascending, among those that enter."""
        prefix = torch.arange(self.prefix_tokens, device=patches.device)
        self.index = torch.cat([prefix, self.prefix_tokens + patches]).to(self.index.device)

    def tokens_after(self, tokens: int) -> int:
        """Return the number of positions."""
        return self.index.numel()

    def macs(self, tokens: int, heads: int, qk_dim: int, dim: int) -> int:
        """Return 0: nothing is computed."""
        return 0

    def forward(self, x: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Take the tokens at the positions."""
        return x[:, self.index]


def patches_kept(patches: int, share: float) -> int:
    """Return how many of the patch tokens stay: ceil((1 - share) * patches), at least 1."""
    # The small slack keeps ceil from turning 0.7 * 10 = 7.000000000000001 into 8.
    return max(1, math.ceil((1.0 - share) * patches - 1e-9))


def split_by_score(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split token indices into those with the `kept` highest scores, best first, and the rest.

    Args:
        scores: [B, N].
        kept: Number of tokens to keep, 0 < kept <= N.

    Returns:
        Indices [B, kept] and [B, N - kept].
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return order[:, :kept], order[:, kept:]


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of `x` [B, N, D] at `index` [B, M], as [B, M, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
