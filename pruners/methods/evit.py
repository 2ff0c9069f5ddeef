"""EViT: keep what the class token attends to, fuse the rest (Liang et al., 2022, 2202.07800)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pruners.families.options import option
from pruners.families.token import TokenPruner, remove_reducers, token_shares
from pruners.model.attention import Attended, attention_rows
from pruners.model.shape import ViTShape
from pruners.model.tokens import (
    MiddleReducer,
    TokenReducer,
    Tokens,
    patches_kept,
    split_by_score,
    take_tokens,
)
from pruners.model.types import Batches, Thresholds
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class EViT(TokenPruner):
    """Keeps the patches that the class token of this block attends to, averaged over heads.

    The kept patches number ceil((1 - share) * patches); the others are fused into one token, their
    sum weighted by attentiveness (not normalised, as in the paper's code). Models without a class
    token use the mean attention that a patch receives from all tokens. No parameters, no training
    needed.

    Attributes:
        fuse: Whether the dropped patches are fused into one token; otherwise they are gone.
        ramp_epochs: Epochs of fine-tuning over which the kept share falls from 1 to its target, as
            a cosine; 0 drops at once.
    """

    fuse: bool = True
    ramp_epochs: int = option(0, low=0)

    def ramped(self, thresholds: Thresholds, epoch: int) -> Thresholds:
        """Return share * (1 - cos(pi * epoch / ramp_epochs)) / 2, and the share after the ramp."""
        progress = min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs else 1.0
        reached = 0.5 * (1.0 - math.cos(math.pi * progress))
        return {site: share * reached for site, share in thresholds.items()}

    def prune(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Cut in place, further than an earlier epoch of the ramp did."""
        if vit.token_step is not None and vit.token_step["method"] == self.name:
            remove_reducers(vit)
        super().prune(vit, batches, thresholds)

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return a reducer behind the attention of each block that is cut."""
        return {
            index: EViTReducer(shape, index, share, fuse=self.fuse)
            for index, share in token_shares(thresholds).items()
        }


class EViTReducer(MiddleReducer):
    """Reorganises the tokens of one block."""

    def __init__(self, shape: ViTShape, index: int, share: float, *, fuse: bool) -> None:
        """Drop a share of the patches of block `index`; the prefix tokens are always kept."""
        super().__init__()
        self.prefix_tokens, self.class_token = shape.prefix_tokens, shape.class_token
        self.share, self.fuse = share, fuse
        self.query_width = shape.blocks[index].heads * shape.blocks[index].qk_dim
        self.dim = shape.dim

    def tokens_after(self, tokens: int) -> int:
        """Prefix, kept patches, and one fused token if any patch was dropped."""
        kept, dropped = self._split(tokens)
        return self.prefix_tokens + kept + (self.fuse and dropped > 0)

    def macs(self, tokens: int) -> int:
        """Count the scoring queries' attention and the weighted sum of the dropped tokens."""
        _, dropped = self._split(tokens)
        if dropped == 0:
            return 0
        queries = 1 if self.class_token else tokens
        return queries * tokens * self.query_width + self.fuse * dropped * self.dim

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Keep the most attended patches."""
        x = tokens.x
        kept, dropped = self._split(x.shape[1])
        if dropped == 0:
            return tokens
        queries = attended.query[:, :, :1] if self.class_token else attended.query
        attentiveness = attention_rows(queries, attended.key, scale).mean(dim=1)[
            :, self.prefix_tokens :
        ]  # [B, patches]
        keep, drop = split_by_score(attentiveness, kept)
        first = self.prefix_tokens
        parts = [x[:, :first], take_tokens(x, first + keep)]
        if self.fuse:
            weights = attentiveness.gather(1, drop).to(x.dtype).unsqueeze(1)  # [B, 1, dropped]
            parts.append(weights @ take_tokens(x, first + drop))
        return tokens._replace(x=torch.cat(parts, dim=1))

    def _split(self, tokens: int) -> tuple[int, int]:
        """How many patches are kept and dropped.

        Dropping one patch and appending a fused one shortens nothing, so nothing is dropped then.
        """
        patches = tokens - self.prefix_tokens
        kept = patches_kept(patches, self.share)
        return (kept, patches - kept) if kept + self.fuse < patches else (patches, 0)
