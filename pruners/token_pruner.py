"""The token family: what token methods that reduce between attention and MLP share."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass

from pruners.allocation import same_share
from pruners.pruner import Scores, Thresholds, TokenPruner
from pruners.shape import BlockShape, ViTShape
from pruners.vit import PrunableViT


@dataclass(frozen=True, kw_only=True)
class BetweenBranches(TokenPruner, abc.ABC):
    """A token method whose reducer stands between the attention and the MLP of a block.

    Its sites are `blocks.<i>.token`, for blocks that have attention; a threshold is the share of
    the patch tokens at hand that is not kept. Shares compound from block to block.
    """

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return a site per block with attention, and the patch tokens that enter it."""
        return {
            f"blocks.{i}.token": block.tokens - shape.prefix_tokens
            for i, block in enumerate(shape.blocks)
            if block.heads
        }

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Let fewer tokens flow on from each block that is cut."""
        self.check(shape, thresholds)
        if any(block.mlp_tokens != block.tokens for block in shape.blocks):
            raise ValueError(
                f"{self.name} got a model with reduced tokens; reduce tokens only once"
            )
        blocks: list[BlockShape] = []
        tokens = shape.blocks[0].tokens
        for index, block in enumerate(shape.blocks):
            share = thresholds.get(f"blocks.{index}.token", 0.0)
            after, macs = tokens, 0
            if share > 0.0:
                reducer = self.reducer(shape, share)
                after = reducer.tokens_after(tokens)
                macs = reducer.macs(tokens, block.heads, block.qk_dim, shape.dim)
            blocks.append(
                dataclasses.replace(block, tokens=tokens, mlp_tokens=after, reducer_macs=macs)
            )
            tokens = after
        return dataclasses.replace(shape, blocks=tuple(blocks))

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Give the blocks at 1/4, 1/2 and 3/4 of the depth the same share, as the papers do."""
        depth = len(shape.blocks)
        places = {f"blocks.{depth * quarter // 4}.token" for quarter in (1, 2, 3)}
        sites = [site for site in self.sites(shape) if site in places]
        return same_share(sites, lambda shares: self.shrink(shape, shares), macs, largest=0.99)

    def cut(self, vit: PrunableViT, scores: Scores, thresholds: Thresholds) -> None:
        """Put a reducer into each block that is cut."""
        shape = vit.shape()
        self.shrink(shape, thresholds)  # refuses what cannot be
        for index, block in enumerate(vit.blocks):
            share = thresholds.get(f"blocks.{index}.token", 0.0)
            if share > 0.0:
                block.reducer = self.reducer(shape, share)
