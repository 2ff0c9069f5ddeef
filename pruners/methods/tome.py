"""ToMe: merge the most similar patches (Bolya et al., 2023, arXiv:2210.09461).

Re-implemented from the paper; no parameters, no training needed. Departure: the prefix tokens take
no part in the matching and stay in front, which gives what the paper's code gives with one class
token, and works for any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.merging import MergingPruner, MergingReducer
from pruners.model.attention import Attended
from pruners.model.merging import Merges, token_sizes, unit_vectors
from pruners.model.shape import ViTShape
from pruners.model.tokens import Tokens, split_by_score


@dataclass(frozen=True, kw_only=True)
class ToMe(MergingPruner):
    """Merges pairs of patches with similar keys, between attention and MLP.

    A merged token is the mean of the patches it stands for, and later attention sees it as that
    many equal keys (proportional attention); pooled models weight their mean in the same way. At
    most half of the patches can be merged in one block: larger shares merge half.
    """

    def reducer(self, shape: ViTShape, index: int, merged: int) -> MergingReducer:
        """Return a module that merges `merged` patches behind the attention of block `index`."""
        return MergeSimilar(shape.prefix_tokens, shape.blocks[index].qk_dim, merged)


class MergeSimilar(MergingReducer):
    """Merges a number of patches into others."""

    def __init__(self, prefix_tokens: int, qk_dim: int, merged: int) -> None:
        """Merge `merged` patches, at most half of those that arrive."""
        super().__init__(prefix_tokens, merged)
        self.qk_dim = qk_dim

    def macs(self, tokens: int) -> int:
        """Count the similarities."""
        patches = tokens - self.prefix_tokens
        return (patches // 2) * (patches - patches // 2) * self.qk_dim

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Merge; the prefix tokens are first, then patches that stayed alone or took others in."""
        x, prefix = tokens.x, self.prefix_tokens
        pairs = match(attended.key.mean(dim=1)[:, prefix:], self.merged, first=prefix % 2)
        x, size = pairs.merges(prefix, x.shape[1]).merge(x, token_sizes(x, tokens.size))
        return tokens._replace(x=x, size=size)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which patches are merged into which.

    The patches are split by position into A and B.

    Attributes:
        first: Position of A's first patch, 0 or 1; A has every other one from there on.
        alone: [B, |A| - M], members of A that stay, ascending.
        gone: [B, M], members of A that are merged.
        partner: [B, M], the member of B that each of them is merged into.
    """

    first: int
    alone: Tensor
    gone: Tensor
    partner: Tensor

    def merges(self, prefix: int, tokens: int) -> Merges:
        """Return the same by positions: the prefix goes on first, then A's that stay, then B."""
        images, device, start = self.gone.shape[0], self.gone.device, prefix + self.first
        front = torch.arange(prefix, device=device)
        b = torch.arange(prefix + 1 - self.first, tokens, 2, device=device)
        kept = torch.cat(
            [front.expand(images, -1), 2 * self.alone + start, b.expand(images, -1)], dim=1
        )
        into = self.partner + (tokens - self.gone.shape[1] - len(b))
        return Merges(kept=kept, gone=2 * self.gone + start, into=into)


@torch.no_grad()
def match(keys: Tensor, merged: int, first: int) -> Pairs:
    """Find, by bipartite soft matching, the patches to merge: those most similar to a patch of B.

    Args:
        keys: [B, N, K] of the patches, averaged over heads.
        merged: M, how many patches are merged, at most N // 2.
        first: See `Pairs`.
    """
    keys = unit_vectors(keys)
    similar = keys[:, first::2] @ keys[:, 1 - first :: 2].transpose(1, 2)  # [B, |A|, |B|]
    best, partner = similar.max(dim=-1)
    gone, alone = split_by_score(best, merged)
    return Pairs(
        first=first,
        alone=alone.sort(dim=1).values,
        gone=gone,
        partner=partner.gather(1, gone),
    )
