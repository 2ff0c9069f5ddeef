"""What merging methods share: how many patches are merged in each block."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from pruners.families.allocation import out_of_reach, smallest
from pruners.families.token import TokenPruner, token_shares
from pruners.model.cost import cost_of
from pruners.model.shape import ViTShape
from pruners.model.sites import block_of
from pruners.model.tokens import MiddleReducer, TokenReducer
from pruners.model.types import Scores, Thresholds


@dataclass(frozen=True, kw_only=True)
class MergingPruner(TokenPruner, abc.ABC):
    """Merges pairs of patches between attention and MLP, at most half of the patches in one block.

    A merged token has the size of all patches that it stands for, and later attention sees it as
    that many equal keys (proportional attention, arXiv:2210.09461); pooled models weight their mean
    in the same way. Larger shares than one half merge half.
    """

    @abc.abstractmethod
    def reducer(self, shape: ViTShape, index: int, merged: int) -> MergingReducer:
        """Return a module that merges `merged` patches behind the attention of block `index`."""

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return a reducer behind the attention of each block that merges anything."""
        reducers: dict[int, TokenReducer] = {}
        patches = shape.patches
        for index, share in token_shares(thresholds).items():
            merged = min(int(share * patches + 0.5), patches // 2)
            if merged:
                reducers[index] = self.reducer(shape, index, merged)
                patches -= merged
        return reducers

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Merge the same number of patches in every block, as ToMe's paper, to one patch."""
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


class MergingReducer(MiddleReducer):
    """Merges a number of patches into others; the prefix tokens stay in front."""

    def __init__(self, prefix_tokens: int, merged: int) -> None:
        """Merge `merged` patches, at most half of those that arrive."""
        super().__init__()
        self.prefix_tokens, self.merged = prefix_tokens, merged

    def tokens_after(self, tokens: int) -> int:
        """Return the tokens without those that are merged into others."""
        return tokens - self.merged
