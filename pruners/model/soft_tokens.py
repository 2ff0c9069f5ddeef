"""Soft token pruning: which tokens to keep, said head by head, and packages of the others.

Z. Kong et al. (2022), "SPViT", arXiv:2112.13890. `d` is the width of a head's slice of the
channels, D / H.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.02
"""Standard deviation of first weights, a truncated normal."""


class Scores(NamedTuple):
    """What a classifier says of tokens.

    Attributes:
        keep: [B, N], probability of keeping.
        logits: [B, N, 2], of keeping and dropping; their exponentials do not sum to one.
    """

    keep: Tensor
    logits: Tensor


class HeadwiseClassifier(nn.Module):
    """Says of every token whether to keep it: one verdict per head, averaged by importance.

    Of head i, with x_i its slice of the channels: z = GELU(Linear(LayerNorm(x_i))); e = [first half
    of z, mean over the tokens that are present of the second half]; u_i = three linear layers of
    widths d / 2, d / 4, 2 over e, with GELU between. Importance a = sigmoid(Linear(GELU(Linear(
    mean of each slice)))). Then keep = sum of a_i softmax(u_i) / sum of a_i, and the logits that
    decisions are drawn from the same average of log softmax(u_i).
    """

    def __init__(self, dim: int, heads: int, share: float) -> None:
        """Start with weights near zero, so that every token is kept with probability `share`."""
        super().__init__()
        width, hidden = dim // heads, max(1, heads // 2)
        self.heads, self.width = heads, width
        # One-dimensional, as every norm and bias here: these have no weight decay.
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.embed = HeadLinear(heads, width, width)
        self.fc1 = HeadLinear(heads, width, width // 2)
        self.fc2 = HeadLinear(heads, width // 2, width // 4)
        self.fc3 = HeadLinear(heads, width // 4, 2)
        self.squeeze = nn.Linear(heads, hidden)
        self.excite = nn.Linear(hidden, heads)
        for layer in (self.squeeze, self.excite):
            nn.init.trunc_normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)
        self.shift(log_odds(share))

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of the linear layers."""
        per_head = sum(
            layer.weight[0].numel() for layer in (self.embed, self.fc1, self.fc2, self.fc3)
        )
        branch = self.squeeze.weight.numel() + self.excite.weight.numel()
        return tokens * (self.heads * per_head + branch)

    def forward(self, x: Tensor, present: Tensor) -> Scores:
        """Score.

        Args:
            x: [B, N, D].
            present: [B, N], to what degree a token counts in the means, 0 to 1.
        """
        slices = x.unflatten(-1, (self.heads, self.width))  # [B, N, H, d]
        importance = self.excite(F.gelu(self.squeeze(slices.mean(dim=-1)))).float().sigmoid()
        importance = importance / importance.sum(dim=-1, keepdim=True)  # [B, N, H]
        verdicts = self.verdicts(slices, present).float()
        # A softmax over two is the sigmoid of their difference, which is faster.
        margin = verdicts[..., 0] - verdicts[..., 1]
        keep, drop = F.logsigmoid(margin), F.logsigmoid(-margin)
        return Scores(
            keep=(importance * margin.sigmoid()).sum(dim=-1),
            logits=(importance.unsqueeze(-1) * torch.stack([keep, drop], dim=-1)).sum(dim=2),
        )

    def verdicts(self, slices: Tensor, present: Tensor) -> Tensor:
        """Return u [B, N, H, 2] of slices [B, N, H, d]; every head sees its own slice alone."""
        batch, tokens = present.shape
        normed = F.layer_norm(slices, (self.width,)) * self.norm_weight.view(self.heads, -1)
        normed = normed + self.norm_bias.view(self.heads, -1)
        z = F.gelu(self.embed(normed.permute(2, 0, 1, 3).flatten(1, 2)))  # [H, B * N, d]
        own, shared = z.unflatten(1, (batch, tokens)).chunk(2, dim=-1)
        weight = (present / present.sum(dim=1, keepdim=True)).view(1, batch, tokens, 1)
        shared = (weight * shared).sum(dim=2, keepdim=True).to(own.dtype).expand_as(own)
        e = torch.cat([own, shared], dim=-1).flatten(1, 2)  # [H, B * N, d]
        u = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(e)))))
        return u.unflatten(1, (batch, tokens)).permute(1, 2, 0, 3)

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Move the log-odds of keeping of every head and token by an amount."""
        self.fc3.bias.view(self.heads, 2)[:, 0] += amount


class HeadLinear(nn.Module):
    """A linear layer for each head, in one batched product."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        """Draw first weights [H, inputs, outputs]."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(heads * outputs))
        nn.init.trunc_normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """Map [H, M, inputs] to [H, M, outputs]."""
        bias = self.bias.view(self.weight.shape[0], 1, -1)
        return torch.baddbmm(bias, x, self.weight)


def package(x: Tensor, weight: Tensor, *, normalise: bool) -> Tensor:
    """Return the weighted mean of tokens, or their weighted sum; zeros if no weight is positive.

    Args:
        x: [B, N, D].
        weight: [B, N], at least 0.
        normalise: Whether to divide by the sum of the weights.

    Returns:
        [B, 1, D].
    """
    total = weight.unsqueeze(1) @ x.to(weight.dtype)
    if not normalise:
        return total
    mass = weight.sum(dim=1)[:, None, None]
    # Dividing by a small number where nothing is dropped would blow up the gradient of the mask.
    return total / torch.where(mass > 0.0, mass, 1.0)


def classifier_heads(dim: int, heads: int) -> int:
    """Return in how many slices to look at the channels: at most `heads` equal ones of 4, 8, ...

    Raises:
        ValueError: If there is no such number.
    """
    for count in range(heads, 0, -1):
        if dim % (4 * count) == 0:
            return count
    raise ValueError(
        f"dim is {dim} with {heads} heads; give a width that is a multiple of 4 and at least 1 head"
    )


def log_odds(share: float) -> float:
    """Return log(share / (1 - share))."""
    return math.log(share / (1.0 - share))
