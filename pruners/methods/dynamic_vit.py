"""DynamicViT: small networks that learn which patches to keep (Rao et al., 2021, 2106.02034)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruners.families.selector import SelectorPruner
from pruners.model.policy import draw_keeps
from pruners.model.shape import ViTShape
from pruners.model.tokens import FrontReducer, TokenReducer, Tokens, split_by_score, take_tokens
from pruners.model.types import Thresholds

POOL_EPS = 1e-6
"""Keeps the mean over the kept patches finite where none is kept."""


@dataclass(frozen=True, kw_only=True)
class DynamicViT(SelectorPruner):
    """Keeps the patches that a prediction module scores highest, image by image.

    Y. Rao et al. (2021), arXiv:2106.02034. The prediction module is section 3.2 (`Predictor`), the
    training with masked attention section 3.3 (`pruners.model.policy.draw_keeps`,
    `pruners.model.attention.softmax_with_policy`), losses and inference section 3.4
    (`pruners.model.policy.PolicyLoss`; `Predictor.gather`). The paper's rate 0.7 at the blocks 3,
    6 and 9 of 12 is a threshold of 0.3 at each of them. DeiT-B was trained with `ratio_weight` 5.

    Departures:
        Modules start at the share that they are to keep; in the paper they start at one half, far
        from it for a fine-tuning of some hundred steps.
        The mean over the kept patches has a small constant in its denominator: a module may drop
        everything, and the paper's code then divides by zero.
        Each image is held at floor(rate^s * patches) / patches, what inference keeps, not at
        rate^s.
        The class loss is the training loop's, (1 - distill) CE + distill KL; in the paper it is
        CE + 0.5 KL, beside the same 0.5 and 2 for the tokens and the ratio.
    """

    per_image: ClassVar[bool] = True

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return a prediction module in front of each block that is cut.

        Raises:
            ValueError: If the width of the model is not a multiple of 4.
        """
        counts = self.counts(shape, thresholds)
        if counts and shape.dim % 4:
            raise ValueError(
                f"width of the model is {shape.dim}; {self.name} needs a multiple of 4, "
                "for its modules halve it twice"
            )
        stages = pairwise([shape.patches, *counts.values()])
        return {
            block: Predictor(
                shape.dim, prefix_tokens=shape.prefix_tokens, arriving=arriving, kept=kept
            )
            for block, (arriving, kept) in zip(counts, stages, strict=True)
        }


class Predictor(FrontReducer):
    """The prediction module: scores patches by themselves and by the mean of those still kept.

    In training dropped patches stay where they are and the policy hides them; otherwise they are
    gone, and those that are kept go on in the order of their scores.
    """

    starts_untrained: ClassVar[bool] = True

    def __init__(self, dim: int, *, prefix_tokens: int, arriving: int, kept: int) -> None:
        """Draw first weights from PyTorch's global generator, as every layer does.

        Args:
            dim: Width D, a multiple of 4.
            prefix_tokens: Tokens in front of the patches; they always go on.
            arriving: Patches that arrive when nothing is masked.
            kept: Patches that go on, 0 < kept < arriving.
        """
        super().__init__()
        self.dim, self.prefix_tokens, self.kept = dim, prefix_tokens, kept
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        last = nn.Linear(dim // 4, 2)
        self.judge = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            last,
            nn.LogSoftmax(dim=-1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        share = kept / arriving
        with torch.no_grad():
            last.bias.copy_(torch.tensor([math.log(share), math.log1p(-share)]))

    def tokens_after(self, tokens: int) -> int:
        """Prefix and kept patches."""
        return self.prefix_tokens + self.kept

    def macs(self, tokens: int) -> int:
        """Count the four linear layers on every patch: D^2 + D^2 / 2 + D^2 / 8 + D / 2 each."""
        square = self.dim**2
        return (tokens - self.prefix_tokens) * (square + square // 2 + square // 8 + self.dim // 2)

    def forward(self, tokens: Tokens) -> Tokens:
        """Mask by a drawn decision in training; otherwise keep the patches of highest score."""
        patches = tokens.x[:, self.prefix_tokens :]
        kept = tokens.decisions[-1] if tokens.decisions else torch.ones_like(patches[..., 0])
        scores = self.log_probabilities(patches, kept)
        if self.training:
            return self.mask(tokens, draw_keeps(scores) * kept)
        return self.gather(tokens, scores[..., 0])

    def log_probabilities(self, patches: Tensor, kept: Tensor) -> Tensor:
        """Return log-probabilities of keeping (0) and dropping (1), [B, N, 2]; section 3.2.

        Args:
            patches: [B, N, D].
            kept: [B, N], 1 for the patches that are still kept, over which the global half of the
                features is averaged, 0 for the others.
        """
        local, rest = self.embed(patches).chunk(2, dim=-1)  # [B, N, D / 2] each
        weight = kept.unsqueeze(-1)
        mean = (weight * rest).sum(dim=1, keepdim=True) / (
            weight.sum(dim=1, keepdim=True) + POOL_EPS
        )  # [B, 1, D / 2]
        return self.judge(torch.cat([local, mean.expand_as(rest)], dim=-1))

    def mask(self, tokens: Tokens, decision: Tensor) -> Tokens:
        """Hide what a decision drops.

        Args:
            tokens: The tokens that arrive.
            decision: [B, patches], 1 for the patches that this module and all before it keep, 0 for
                the others.
        """
        prefix = decision.new_ones(len(decision), self.prefix_tokens)
        return tokens._replace(
            policy=torch.cat([prefix, decision], dim=1),
            decisions=(*tokens.decisions, decision),
        )

    def gather(self, tokens: Tokens, scores: Tensor) -> Tokens:
        """Take the prefix and the patches of highest score, best first.

        Args:
            tokens: The tokens that arrive.
            scores: [B, patches].
        """
        keep, _ = split_by_score(scores, self.kept)
        x, first = tokens.x, self.prefix_tokens
        return tokens._replace(x=torch.cat([x[:, :first], take_tokens(x, first + keep)], dim=1))
