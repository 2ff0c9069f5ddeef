"""ToMe: merge the most similar patches (Bolya et al., 2023, arXiv:2210.09461).

Re-implemented from the paper; no parameters, no training needed. Departure: the prefix tokens take
no part in the matching and stay in front, which gives what the paper's code gives with one class
token, and works for any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.allocation import out_of_reach, smallest
from pruners.families.token import TokenPruner, token_shares
from pruners.model.attention import Attended
from pruners.model.cost import cost_of
from pruners.model.shape import ViTShape
from pruners.model.sites import block_of
from pruners.model.tokens import MiddleReducer, TokenReducer, Tokens, split_by_score, take_tokens
from pruners.model.types import Scores, Thresholds

LEAST_NORM = 1e-12
"""Keeps a key of zeros finite when it is normalised."""


@dataclass(frozen=True, kw_only=True)
class ToMe(TokenPruner):
    """Merges pairs of patches with similar keys, between attention and MLP.

    A merged token is the mean of the patches it stands for, and later attention sees it as that
    many equal keys (proportional attention); pooled models weight their mean in the same way. At
    most half of the patches can be merged in one block: larger shares merge half.
    """

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return a reducer behind the attention of each block that merges anything."""
        reducers: dict[int, TokenReducer] = {}
        patches = shape.patches
        for index, share in token_shares(thresholds).items():
            merged = min(int(share * patches + 0.5), patches // 2)
            if merged:
                reducers[index] = MergeSimilar(
                    shape.prefix_tokens, shape.blocks[index].qk_dim, merged
                )
                patches -= merged
        return reducers

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Merge the same number of patches in every block, as in the paper, to one patch."""
        blocks = [block_of(site) for site in self.sites(shape)]

        def shares(total: int) -> dict[str, float]:
            found, patches = {}, shape.patches
            for place, block in enumerate(blocks):
                merged = (place + 1) * total // len(blocks) - place * total // len(blocks)
                merged = min(merged, patches // 2)
                found[f"blocks.{block}.token"] = merged / patches
                patches -= merged
            return found

        most = shape.patches * len(blocks)
        total = smallest(
            most, lambda n: cost_of(self.shrink(shape, shares(n))).effective_macs <= macs
        )
        if total is None:
            raise out_of_reach(macs, self.shrink(shape, shares(most)))
        return shares(total)


class MergeSimilar(MiddleReducer):
    """Merges a number of patches into others."""

    def __init__(self, prefix_tokens: int, qk_dim: int, merged: int) -> None:
        """Merge `merged` patches, at most half of those that arrive."""
        super().__init__()
        self.prefix_tokens, self.qk_dim, self.merged = prefix_tokens, qk_dim, merged

    def tokens_after(self, tokens: int) -> int:
        """Return the tokens without those that are merged into others."""
        return tokens - self.merged

    def macs(self, tokens: int) -> int:
        """Count the similarities."""
        patches = tokens - self.prefix_tokens
        return (patches // 2) * (patches - patches // 2) * self.qk_dim

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Merge; the prefix tokens are first, then patches that stayed alone or took others in."""
        x, prefix = tokens.x, self.prefix_tokens
        size = x.new_ones(x.shape[:2]) if tokens.size is None else tokens.size
        pairs = match(attended.key.mean(dim=1)[:, prefix:], self.merged, first=prefix % 2)
        x, size = pairs.merge(x, size, prefix)
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

    def merge(self, x: Tensor, size: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Return the prefix tokens, the members of A that stay, then B: [B, N - M, D] and sizes.

        A merged token is (sum of size * x) / (sum of sizes); the others stay, bit for bit.

        Args:
            x: [B, N, D], the prefix tokens in front.
            size: [B, N].
            prefix: How many prefix tokens there are.
        """
        kept, gone, into = self._places(prefix, size.shape[1])
        size_kept, size_gone = size.gather(1, kept), size.gather(1, gone)
        total = size_kept.scatter_add(1, into, size_gone)
        share = torch.cat([size_kept / total, size_gone / total.gather(1, into)], dim=1)
        # All rows at once: with one image, the calls cost more than the rows that are moved.
        rows = take_tokens(x, torch.cat([kept, gone], dim=1)) * share.unsqueeze(-1)
        kept_rows, gone_rows = rows.split([kept.shape[1], gone.shape[1]], dim=1)
        into = into.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return kept_rows.scatter_add(1, into, gone_rows), total

    def _places(self, prefix: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what stays, [B, N - M], what goes, [B, M], and where among the former it goes."""
        images, device, start = self.gone.shape[0], self.gone.device, prefix + self.first
        front = torch.arange(prefix, device=device)
        b = torch.arange(prefix + 1 - self.first, tokens, 2, device=device)
        kept = torch.cat(
            [front.expand(images, -1), 2 * self.alone + start, b.expand(images, -1)], dim=1
        )
        return kept, 2 * self.gone + start, self.partner + (tokens - self.gone.shape[1] - len(b))


@torch.no_grad()
def match(keys: Tensor, merged: int, first: int) -> Pairs:
    """Find, by bipartite soft matching, the patches to merge: those most similar to a patch of B.

    Args:
        keys: [B, N, K] of the patches, averaged over heads.
        merged: M, how many patches are merged, at most N // 2.
        first: See `Pairs`.
    """
    keys = keys.float()
    keys = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(LEAST_NORM)
    similar = keys[:, first::2] @ keys[:, 1 - first :: 2].transpose(1, 2)  # [B, |A|, |B|]
    best, partner = similar.max(dim=-1)
    gone, alone = split_by_score(best, merged)
    return Pairs(
        first=first,
        alone=alone.sort(dim=1).values,
        gone=gone,
        partner=partner.gather(1, gone),
    )
