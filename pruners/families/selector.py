"""What the token methods share that learn which tokens to keep."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

from pruners.families.allocation import same_share
from pruners.families.options import option
from pruners.families.token import TokenPruner, quarters, token_shares
from pruners.model.cost import cost_of
from pruners.model.policy import PolicyLoss
from pruners.model.shape import ViTShape
from pruners.model.types import Scores, Thresholds
from pruners.model.vit import ViT

EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed")
"""What is never trained beside a selector, as in the code of DynamicViT and of SPViT."""


@dataclass(frozen=True, kw_only=True)
class SelectorPruner(TokenPruner, abc.ABC):
    """A method with a small network, in front of some blocks, that says which patches go on.

    Thresholds compound: the patches that a selector keeps number floor(patches * product of
    (1 - share) up to it). In training nothing is removed (`pruners.model.policy`); otherwise
    exactly that many patches go on, the ones with the highest scores. The selectors are part of the
    model.

    Attributes:
        blocks: Blocks that a selector may stand in front of; if empty, those at 1/4, 1/2 and 3/4 of
            the depth, as in the papers.
        ratio_weight: Weight of the loss that holds the kept share at its target.
        token_weight: Weight of the distance of the kept tokens to the teacher's.
    """

    per_image: ClassVar[bool]
    """Whether every image is held at the target in training, or the batch on the whole."""
    least_dropped: ClassVar[int] = 1
    """A selector that drops fewer patches than these is left out."""

    blocks: tuple[int, ...] = option((), low=1)
    ratio_weight: float = option(2.0, low=0.0)
    token_weight: float = option(0.5, low=0.0)

    def __post_init__(self) -> None:
        """Check also that the blocks are different ones."""
        super().__post_init__()
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"option blocks of {self.name} is {list(self.blocks)}; give different blocks"
            )

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return a site in front of each block that may have a selector.

        Raises:
            ValueError: If the option `blocks` names a block that does not exist.
        """
        depth = len(shape.blocks)
        if wrong := [block for block in self.blocks if block >= depth]:
            raise ValueError(
                f"option blocks of {self.name} has {wrong[0]}; give 1 to {depth - 1} of this model"
            )
        places = sorted(self.blocks) or [block for block in quarters(shape) if block > 0]
        return {f"blocks.{block}.token": shape.patches for block in places}

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Give all sites the same share, as the papers do."""
        sites = list(self.sites(shape))
        # Small shares cost more than the dense model, for the selectors themselves cost something.
        if cost_of(shape).effective_macs <= macs:
            return dict.fromkeys(sites, 0.0)
        return same_share(sites, lambda shares: self.shrink(shape, shares), macs, largest=0.99)

    def counts(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, int]:
        """Return block -> patches that its selector keeps, where it drops enough to be there."""
        counts: dict[int, int] = {}
        before, share_left = shape.patches, 1.0
        for block, share in token_shares(thresholds).items():
            share_left *= 1.0 - share
            # The slack keeps floor from turning 0.7 * 10 = 6.999999999999999 into 6.
            kept = max(1, math.floor(share_left * shape.patches + 1e-9))
            if before - kept >= self.least_dropped:
                counts[block] = before = kept
        return counts

    def loss(self, shape: ViTShape, thresholds: Thresholds) -> PolicyLoss | None:
        """Return the ratio loss and the distillation of the kept tokens."""
        counts = self.counts(shape, thresholds)
        return (
            PolicyLoss(
                targets=tuple(count / shape.patches for count in counts.values()),
                prefix_tokens=shape.prefix_tokens,
                patches=shape.patches,
                ratio_weight=self.ratio_weight,
                token_weight=self.token_weight,
                per_image=self.per_image,
            )
            if counts
            else None
        )

    def place(self, vit: ViT, thresholds: Thresholds) -> None:
        """Put the selectors into a model, whose embeddings are not trained any more."""
        super().place(vit, thresholds)
        if vit.token_step is not None:
            for name in EMBEDDINGS:
                if (parameter := getattr(vit.vit, name, None)) is not None:
                    parameter.requires_grad_(False)
