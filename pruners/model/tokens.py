"""Tokens on their way through a model, and what reduces them.

Pure functions of tensors, and the interfaces of the modules that a token method puts in front of a
block, or between its attention and its MLP.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pruners.model.attention import Attended


class Tokens(NamedTuple):
    """The residual stream, and what is known of its tokens.

    Attributes:
        x: [B, N, D], the prefix tokens first.
        size: [B, N], how many patches each token stands for; None if each stands for one.
        policy: [B, N], 1 where a token is kept and 0 where it was dropped but is still carried
            along, in training; None where dropped tokens are really gone.
        decisions: After each selector that was passed in training, [B, patches]: 1 for the patches
            that it and all before it keep, 0 for the others, differentiable.
    """

    x: Tensor
    size: Tensor | None = None
    policy: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()


TokenLoss = Callable[[Tokens, Tokens | None], Tensor]
"""What a token method adds to the training loss: the model's tokens behind its last norm, and those
of the teacher if there is one -> []."""


class TokenReducer(nn.Module, abc.ABC):
    """Reduces the tokens at one place of a model, to the same number in every image."""

    starts_untrained: ClassVar[bool] = False
    """Whether its parameters mean nothing before they are trained."""

    @abc.abstractmethod
    def tokens_after(self, tokens: int) -> int:
        """Return how many tokens leave when `tokens` enter (prefix included)."""

    @abc.abstractmethod
    def macs(self, tokens: int) -> int:
        """Return the multiply-adds per image that the reduction itself costs."""


class FrontReducer(TokenReducer):
    """Stands in front of a block."""

    @abc.abstractmethod
    def forward(self, tokens: Tokens) -> Tokens:
        """Reduce the tokens that enter the block."""


class MiddleReducer(TokenReducer):
    """Stands between the attention and the MLP of a block."""

    @abc.abstractmethod
    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Reduce.

        Args:
            tokens: The tokens after this block's attention, its residual addition included.
            attended: What this block's attention computed.
            scale: Softmax scale of this block's attention.
        """


class KeepPatches(MiddleReducer):
    """Keeps the tokens at fixed positions, the same of every image.

    Attributes:
        index: [M], positions among the tokens that enter, prefix tokens included.
    """

    index: Tensor

    def __init__(self, prefix_tokens: int, patches: int) -> None:
        """Keep the prefix tokens and the first `patches` patches until `keep` says which."""
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.register_buffer("index", torch.arange(prefix_tokens + patches))

    def keep(self, patches: Tensor) -> None:
        """Keep the patches at the given positions, ascending, among those that enter."""
        prefix = torch.arange(self.prefix_tokens, device=patches.device)
        self.index = torch.cat([prefix, self.prefix_tokens + patches]).to(self.index.device)

    def tokens_after(self, tokens: int) -> int:
        """Return the number of positions."""
        return self.index.numel()

    def macs(self, tokens: int) -> int:
        """Return 0: nothing is computed."""
        return 0

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Take the tokens at the positions."""
        return tokens._replace(x=tokens.x[:, self.index])


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
    order = scores.topk(scores.shape[1], dim=1).indices  # ONNX has no stable sort
    return order[:, :kept], order[:, kept:]


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of `x` [B, N, D] at `index` [B, M], as [B, M, D].

    Give all tokens and indices into them rather than a slice, which would be copied.
    """
    # Whole rows: gather would read an index for every number, 16 times slower on a CPU.
    starts = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    rows = (index + starts).flatten()
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape)


def weighted_pool(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Pool tokens that count differently, as timm pools tokens that all count alike.

    Args:
        x: [B, N, D].
        weight: [B, N], how often each token counts; 0 for tokens that are gone.
        kind: timm's `global_pool`: "avg", "max" or "avgmax".

    Returns:
        [B, D]; zeros for an image in which nothing counts.
    """
    weight = weight.to(x.dtype).unsqueeze(-1)
    counted = weight.sum(dim=1)
    mean = (weight * x).sum(dim=1) / torch.where(counted > 0.0, counted, 1.0)
    if kind == "avg":
        return mean
    most = x.masked_fill(weight == 0.0, float("-inf")).amax(dim=1)
    most = most.masked_fill(counted == 0.0, 0.0)
    return most if kind == "max" else 0.5 * (most + mean)
