"""MCTF: multi-criteria token fusion (Lee et al., 2024, arXiv:2403.10030).

Re-implemented from the paper and its code; no parameters, no training needed. Departures: tokens
are fused behind a block's attention, by the attention that this block has paid, not in front of it
by a first pass of the next ("one step ahead"); there is no loss of consistency between reduced and
whole; the prefix tokens take no part, and stay in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.merging import MergingPruner, MergingReducer
from pruners.families.options import option
from pruners.model.attention import Attended, attention_rows
from pruners.model.merging import Merges, token_sizes, unit_vectors
from pruners.model.shape import ViTShape
from pruners.model.tokens import Tokens, split_by_score, take_tokens

LEAST = 1e-12
"""Keeps logarithms of opposite tokens, and of attention that underflows, finite."""


@dataclass(frozen=True, kw_only=True)
class MCTF(MergingPruner):
    """Fuses patches that are alike, of little attention, and small.

    Two patches attract each other by ((1 + cos(x_i, x_j)) / 2)^tau_sim * (1 / (a_i a_j))^tau_info *
    (1 / (s_i s_j))^tau_size, with a the mean attention that a token receives and s its size. One
    half of the M patches to go moves from A, every other patch, into B, the other half from B into
    what is left of A. A fused token is the mean of its patches by attention and size; later
    attention is as in `tome`.

    Attributes:
        tau_sim: Exponent of the similarity; its code takes the inverse of each of the three.
        tau_info: Exponent of the attention received; 0 leaves it out.
        tau_size: Exponent of the size; 0 leaves it out.
    """

    tau_sim: float = option(1.0, low=0.0)
    tau_info: float = option(0.05, low=0.0)
    tau_size: float = option(0.025, low=0.0)

    def reducer(self, shape: ViTShape, index: int, merged: int) -> MergingReducer:
        """Return a module that merges `merged` patches behind the attention of block `index`."""
        return FuseByCriteria(shape, index, merged, self)


class FuseByCriteria(MergingReducer):
    """Fuses a number of patches into others."""

    def __init__(self, shape: ViTShape, index: int, merged: int, method: MCTF) -> None:
        """Fuse `merged` patches in block `index`, at most half of those that arrive."""
        super().__init__(shape.prefix_tokens, merged)
        self.dim = shape.dim
        self.query_width = shape.blocks[index].heads * shape.blocks[index].qk_dim
        self.method = method

    def macs(self, tokens: int) -> int:
        """Count the attention of all queries, and the similarities between A and B."""
        patches = tokens - self.prefix_tokens
        similarities = (patches // 2) * (patches - patches // 2) * self.dim
        return tokens**2 * self.query_width + similarities

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Fuse; the prefix tokens are first, then what stays of A, then of B."""
        x, prefix = tokens.x, self.prefix_tokens
        size = token_sizes(x, tokens.size)
        with torch.no_grad():
            received = attention_received(attended, scale, tokens.size)
            first = prefix % 2
            scores = attraction(
                x[:, prefix:], received[:, prefix:], size[:, prefix:], first, self.method
            )
            merges = bidirectional_match(scores, self.merged, first, prefix)
        x, size = merges.merge(x, size, received * size)
        return tokens._replace(x=x, size=size)


def attention_received(attended: Attended, scale: float, size: Tensor | None) -> Tensor:
    """Return the attention that each token receives, mean over heads and queries, [B, N].

    Args:
        attended: What this block's attention computed.
        scale: Softmax scale.
        size: [B, N], sizes that the attention was computed with.
    """
    rows = attention_rows(attended.query, attended.key, scale, size)
    return rows.float().mean(dim=1).clamp_min(LEAST)


def attraction(x: Tensor, received: Tensor, size: Tensor, first: int, method: MCTF) -> Tensor:
    """Return the logarithm of the attraction between the patches of A and of B, [B, |A|, |B|].

    Lee et al. (2024), section 3.2. The code scales 1 / a and 1 / s to a largest value of 1, which
    adds the same number to all logarithms of an image.

    Args:
        x: [B, P, D], the patches.
        received: [B, P], attention that each receives.
        size: [B, P], patches that each stands for.
        first: Position of A's first patch, 0 or 1; A has every other one from there on.
        method: Holds the exponents.
    """
    x = unit_vectors(x)
    cosines = x[:, first::2] @ x[:, 1 - first :: 2].transpose(1, 2)
    alike = (0.5 * (1.0 + cosines)).clamp_min(LEAST).log()
    own = method.tau_info * received.log() + method.tau_size * size.float().log()
    a, b = own[:, first::2].unsqueeze(2), own[:, 1 - first :: 2].unsqueeze(1)
    return method.tau_sim * alike - a - b


def bidirectional_match(scores: Tensor, merged: int, first: int, prefix: int) -> Merges:
    """Find the patches to fuse: half of them go from A into B, the others from B into A.

    A patch of B that has taken in others may go on into A with them.

    Args:
        scores: [B, |A|, |B|].
        merged: M, how many patches are fused, at most (|A| + |B|) // 2.
        first: See `attraction`.
        prefix: How many prefix tokens stand in front of the patches.
    """
    forth, back = merged // 2, merged - merged // 2
    best, partner = scores.max(dim=2)
    gone_a, alone = split_by_score(best, forth)
    alone = alone.sort(dim=1).values
    best, partner_b = take_tokens(scores, alone).max(dim=1)  # of those that A still has
    gone_b, left = split_by_score(best, back)
    left = left.sort(dim=1).values

    device = scores.device
    front = torch.arange(prefix, device=device).expand(scores.shape[0], -1)
    start = prefix + alone.shape[1]
    last = torch.arange(start, start + left.shape[1], device=device).expand_as(left)
    place = (prefix + partner_b).scatter(1, left, last)  # [B, |B|], where each of B is found
    a, b = prefix + first, prefix + 1 - first
    return Merges(
        kept=torch.cat([front, 2 * alone + a, 2 * left + b], dim=1),
        gone=torch.cat([2 * gone_a + a, 2 * gone_b + b], dim=1),
        into=place.gather(1, torch.cat([partner.gather(1, gone_a), gone_b], dim=1)),
    )
