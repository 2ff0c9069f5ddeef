"""EViT: keep what the class token attends to, fuse the rest (Liang et al., 2022, 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.attention import attention_rows
from pruners.pruner import Batches, Scores
from pruners.shape import ViTShape
from pruners.token_pruner import BetweenBranches
from pruners.tokens import TokenReducer, patches_kept, split_by_score, take_tokens
from pruners.vit import PrunableViT


@dataclass(frozen=True, kw_only=True)
class EViT(BetweenBranches):
    """Keeps the patches that the class token of this block attends to, averaged over heads.

    The kept patches number ceil((1 - share) * patches); the others are fused into one token, their
    sum weighted by attentiveness (not normalised, as in the paper's code). Models without a class
    token use the mean attention that a patch receives from all tokens. No parameters, no training
    needed.

    Attributes:
        fuse: Whether the dropped patches are fused into one token; otherwise they are gone.
    """

    fuse: bool = True

    def score(self, vit: PrunableViT, batches: Batches) -> Scores:
        """Return nothing: tokens are scored image by image while the model runs."""
        return {}

    def reducer(self, shape: ViTShape, share: float) -> EViTReducer:
        """Return the module for one block."""
        recipe = {"method": self.name, "options": self.options(), "share": share}
        return EViTReducer(
            recipe, shape.prefix_tokens, share, class_token=shape.class_token, fuse=self.fuse
        )


class EViTReducer(TokenReducer):
    """Reorganises the tokens of one block."""

    def __init__(
        self,
        recipe: dict[str, object],
        prefix_tokens: int,
        share: float,
        *,
        class_token: bool,
        fuse: bool,
    ) -> None:
        """Set the share of patches to drop; the first `prefix_tokens` tokens are always kept."""
        super().__init__(recipe)
        self.prefix_tokens = prefix_tokens
        self.share = share
        self.class_token = class_token
        self.fuse = fuse

    def tokens_after(self, tokens: int) -> int:
        """Prefix, kept patches, and one fused token if any patch was dropped."""
        kept, dropped = self._split(tokens)
        return self.prefix_tokens + kept + (self.fuse and dropped > 0)

    def macs(self, tokens: int, heads: int, qk_dim: int, dim: int) -> int:
        """Count the scoring queries' attention and the weighted sum of the dropped tokens."""
        _, dropped = self._split(tokens)
        if dropped == 0:
            return 0
        queries = 1 if self.class_token else tokens
        return queries * tokens * heads * qk_dim + self.fuse * dropped * dim

    def forward(self, x: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Keep the most attended patches; see `TokenReducer.forward`."""
        kept, dropped = self._split(x.shape[1])
        if dropped == 0:
            return x
        queries = query[:, :, :1] if self.class_token else query
        attentiveness = attention_rows(queries, key, scale).mean(dim=1)[
            :, self.prefix_tokens :
        ]  # [B, patches]
        keep, drop = split_by_score(attentiveness, kept)
        prefix, body = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        parts = [prefix, take_tokens(body, keep)]
        if self.fuse:
            weights = attentiveness.gather(1, drop).to(x.dtype).unsqueeze(1)  # [B, 1, dropped]
            parts.append(weights @ take_tokens(body, drop))
        return torch.cat(parts, dim=1)

    def _split(self, tokens: int) -> tuple[int, int]:
        """How many patches are kept and dropped.

        Dropping one patch and appending a fused one shortens nothing, so nothing is dropped then.
        """
        patches = tokens - self.prefix_tokens
        kept = patches_kept(patches, self.share)
        return (kept, patches - kept) if kept + self.fuse < patches else (patches, 0)
