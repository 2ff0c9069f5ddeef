"""Keep decisions while a token selector is trained: how they are drawn, what steers them.

Y. Rao et al. (2021), "DynamicViT", arXiv:2106.02034; Z. Kong et al. (2022), "SPViT",
arXiv:2112.13890. In training nothing is removed: attention does not see what a policy drops
(`pruners.model.attention.softmax_with_policy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.model.tokens import Tokens


def draw_keeps(log_probabilities: Tensor) -> Tensor:
    """Draw keep decisions with the gradient of the soft sample (straight-through Gumbel softmax).

    Args:
        log_probabilities: [B, N, 2] of keeping (0) and dropping (1).

    Returns:
        [B, N], 1 or 0.
    """
    return F.gumbel_softmax(log_probabilities.float(), tau=1.0, hard=True)[..., 0]


def ratio_loss(
    decisions: tuple[Tensor, ...], targets: tuple[float, ...], *, per_image: bool
) -> Tensor:
    """Return the mean over selectors of (target - share of the patches that is kept)^2, [].

    Args:
        decisions: [B, N] of each selector.
        targets: Share of all patches that each is to keep.
        per_image: Whether every image is to keep that share (DynamicViT, section 3.4), or the
            batch on the whole (SPViT).
    """
    kept = torch.stack(decisions).float().mean(dim=-1)  # [S, B]
    wanted = kept.new_tensor(targets)
    if not per_image:
        return (wanted - kept.mean(dim=1)).square().mean()
    return (wanted.unsqueeze(1) - kept).square().mean()


def kept_tokens_loss(tokens: Tensor, taught: Tensor, keep: Tensor) -> Tensor:
    """Return the mean squared error of the tokens that are kept, []; 0 if none is.

    Args:
        tokens: [B, N, D] of the student.
        taught: [B, N, D] of the teacher.
        keep: [B, N], above 0.5 where a token is kept; no gradient flows into it.
    """
    kept = (keep.detach() > 0.5).to(torch.float32)
    errors = (tokens.float() - taught.float()).square().mean(dim=-1)  # [B, N]
    return (errors * kept).sum() / kept.sum().clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What a token selector adds to the training loss.

    Attributes:
        targets: Share of all patches that each selector is to keep, first selector first.
        prefix_tokens: Tokens in front of the patches.
        patches: Number of patches; tokens behind them are not compared with the teacher's.
        ratio_weight: Weight of `ratio_loss`.
        token_weight: Weight of `kept_tokens_loss`, for which there must be a teacher.
        per_image: See `ratio_loss`.
    """

    targets: tuple[float, ...]
    prefix_tokens: int
    patches: int
    ratio_weight: float
    token_weight: float
    per_image: bool

    def __call__(self, tokens: Tokens, taught: Tokens | None) -> Tensor:
        """Return the loss of a batch, []; 0 of tokens that no selector has drawn decisions on."""
        if not tokens.decisions:
            return tokens.x.new_zeros(())
        ratio = ratio_loss(tokens.decisions, self.targets, per_image=self.per_image)
        loss = self.ratio_weight * ratio
        if taught is None:
            return loss
        patches = slice(self.prefix_tokens, self.prefix_tokens + self.patches)
        return loss + self.token_weight * kept_tokens_loss(
            tokens.x[:, patches], taught.x[:, patches], tokens.decisions[-1]
        )
