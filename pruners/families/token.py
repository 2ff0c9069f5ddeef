"""The token family: fewer tokens flow from some block on."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from pruners.families.allocation import same_share
from pruners.families.pruner import Pruner
from pruners.model.shape import BlockShape, ViTShape
from pruners.model.sites import block_of
from pruners.model.tokens import FrontReducer, MiddleReducer, TokenLoss, TokenReducer
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class TokenPruner(Pruner, abc.ABC):
    """A method that lets fewer tokens flow.

    Its sites are `blocks.<i>.token`; a threshold is the share of the patch tokens that arrive there
    and do not go on. Shares compound from block to block. Which tokens these are is decided image
    by image while the model runs; how many is the same in every image.
    """

    family: ClassVar[str] = "token"

    @abc.abstractmethod
    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return block -> module that reduces the tokens there, where anything goes."""

    def loss(self, shape: ViTShape, thresholds: Thresholds) -> TokenLoss | None:
        """Return what is added to the training loss of a model with these reducers, if anything."""
        return None

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return a site per block with attention, and the number of patches."""
        return {
            f"blocks.{i}.token": shape.patches
            for i, block in enumerate(shape.blocks)
            if block.heads
        }

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return nothing: tokens are scored image by image while the model runs."""
        return {}

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Let fewer tokens flow on from each place that is cut.

        Raises:
            ValueError: If tokens have been reduced before.
        """
        self.check(shape, thresholds)
        if shape.reduced:
            raise ValueError(
                f"{self.name} got a model with reduced tokens; reduce tokens only once"
            )
        with torch.device("meta"):  # numbers only
            return with_reducers(shape, self.reducers(shape, thresholds))

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Give the blocks at 1/4, 1/2 and 3/4 of the depth the same share, as the papers do."""
        places = {f"blocks.{block}.token" for block in quarters(shape)}
        sites = [site for site in self.sites(shape) if site in places]
        return same_share(sites, lambda shares: self.shrink(shape, shares), macs, largest=0.99)

    def cut(self, vit: ViT, scores: Scores, thresholds: Thresholds) -> None:
        """Put a reducer into each block that is cut."""
        self.shrink(vit.shape(), thresholds)  # refuses what cannot be
        self.place(vit, thresholds)

    def place(self, vit: ViT, thresholds: Thresholds) -> None:
        """Put reducers with first weights into a model, also when a saved one is opened."""
        shape = vit.shape()
        put_reducers(vit, self, self.reducers(shape, thresholds), thresholds)
        vit.token_loss = self.loss(shape, thresholds)


def quarters(shape: ViTShape) -> list[int]:
    """Return the blocks at 1/4, 1/2 and 3/4 of the depth: 3, 6 and 9 of 12."""
    return sorted({len(shape.blocks) * quarter // 4 for quarter in (1, 2, 3)})


def token_shares(thresholds: Thresholds) -> dict[int, float]:
    """Return block -> share of its token site, first block first, where anything goes."""
    shares = {
        block_of(site): share
        for site, share in thresholds.items()
        if site.endswith(".token") and share > 0.0
    }
    return dict(sorted(shares.items()))


def with_reducers(shape: ViTShape, reducers: Mapping[int, TokenReducer]) -> ViTShape:
    """Return the shape of a model, none of whose tokens are reduced yet, with these reducers."""
    blocks: list[BlockShape] = []
    tokens = shape.blocks[0].tokens
    for index, block in enumerate(shape.blocks):
        entering = after = tokens
        macs = params = 0
        if (reducer := reducers.get(index)) is not None:
            after, macs = reducer.tokens_after(tokens), reducer.macs(tokens)
            params = sum(p.numel() for p in reducer.parameters())
            if isinstance(reducer, FrontReducer):
                entering = after
        blocks.append(
            dataclasses.replace(
                block,
                tokens=entering,
                mlp_tokens=after,
                reducer_macs=macs,
                reducer_params=params,
            )
        )
        tokens = after
    return dataclasses.replace(shape, blocks=tuple(blocks))


def put_reducers(
    vit: ViT,
    pruner: Pruner,
    reducers: Mapping[int, TokenReducer],
    thresholds: Thresholds,
) -> None:
    """Put reducers into the blocks of a model, and note what a saved model needs to do so again."""
    device = next(vit.parameters()).device
    for index, reducer in reducers.items():
        reducer.to(device).train(vit.training)
        if isinstance(reducer, FrontReducer):
            vit.blocks[index].front = reducer
        elif isinstance(reducer, MiddleReducer):
            vit.blocks[index].middle = reducer
    if reducers:
        vit.token_step = {
            "method": pruner.name,
            "options": pruner.options(),
            "thresholds": {f"blocks.{i}.token": s for i, s in token_shares(thresholds).items()},
        }


def remove_reducers(vit: ViT) -> None:
    """Take the reducers out of a model: all its tokens flow again."""
    for block in vit.blocks:
        block.front = block.middle = None
    vit.token_step = vit.token_loss = None
