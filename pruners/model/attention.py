"""Multi-head self-attention in which q/k and v may have widths of their own.

timm's `Attention` has one head width for q, k and v and derives the softmax scale from it, so it
cannot express a pruned attention: cutting q/k dims would change the temperature. This module keeps
timm's parameter names and takes over timm's own layers. Its tokens may count differently: those
that stand for several patches (`size`), and those that were dropped but are still there (`policy`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

POLICY_EPS = 1e-6
"""Keeps the softmax under a policy finite where nothing is kept (DynamicViT's value)."""


class Attended(NamedTuple):
    """What attention computed.

    Attributes:
        output: [B, N, D], what is added to the residual stream.
        query: [B, H, N, K].
        key: [B, H, N, K].
    """

    output: Tensor
    query: Tensor
    key: Tensor


class Mixed(NamedTuple):
    """What attention computed, before it is projected.

    Attributes:
        output: [B, N, H * V], the values of all heads, mixed.
        query: [B, H, N, K].
        key: [B, H, N, K].
    """

    output: Tensor
    query: Tensor
    key: Tensor


class Attention(nn.Module):
    """Self-attention over `heads` heads, with q/k of width `qk_dim` and v of width `v_dim`.

    The logits are q k^T * `scale`. The rows of `qkv` are q of all heads, k of all heads, then v of
    all heads.
    """

    def __init__(self, attention: TimmAttention) -> None:
        """Take over the layers of a timm attention."""
        super().__init__()
        self.heads: int = attention.num_heads
        self.qk_dim: int = attention.head_dim
        self.v_dim: int = attention.head_dim
        self.scale: float = attention.scale
        self.fused_attn: bool = attention.fused_attn
        self.qkv: nn.Linear = attention.qkv
        self.q_norm: nn.Module = attention.q_norm
        self.k_norm: nn.Module = attention.k_norm
        self.attn_drop: nn.Dropout = attention.attn_drop
        self.norm: nn.Module = attention.norm
        self.proj: nn.Linear = attention.proj
        self.proj_drop: nn.Module = attention.proj_drop

    def forward(
        self, x: Tensor, size: Tensor | None = None, policy: Tensor | None = None
    ) -> Attended:
        """Attend.

        Args:
            x: [B, N, D].
            size: [B, N]; a key of size s counts as s equal keys.
            policy: [B, N]; a key is seen to the degree of its policy, from 0 to 1, and always by
                itself. See `softmax_with_policy`.
        """
        mixed = self.mix(x, size, policy)
        return Attended(self.proj_drop(self.proj(mixed.output)), mixed.query, mixed.key)

    def mix(self, x: Tensor, size: Tensor | None, policy: Tensor | None) -> Mixed:
        """Return what `proj` reads of x [B, N, D]; see `forward`."""
        qk, v_width = self.heads * self.qk_dim, self.heads * self.v_dim
        q, k, v = self.qkv(x).split([qk, qk, v_width], dim=-1)
        q = self.q_norm(self._by_head(q, self.qk_dim))  # [B, H, N, K]
        k = self.k_norm(self._by_head(k, self.qk_dim))
        v = self._by_head(v, self.v_dim)  # [B, H, N, V]
        bias = size.log()[:, None, None, :].to(q.dtype) if size is not None else None
        if policy is None and self.fused_attn:
            mixed = self._fused(q, k, v, bias)
        else:
            mixed = self._unfused(q, k, v, bias, policy)
        return Mixed(self.norm(mixed.transpose(1, 2).flatten(2)), q, k)

    def _by_head(self, x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (self.heads, width)).transpose(1, 2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale
        )

    def _unfused(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, policy: Tensor | None
    ) -> Tensor:
        logits = (q * self.scale) @ k.transpose(-2, -1)  # [B, H, N, N]
        if bias is not None:
            logits = logits + bias
        if policy is None:
            weights = logits.softmax(dim=-1)
        else:
            weights = softmax_with_policy(logits, policy).to(v.dtype)
        return self.attn_drop(weights) @ v


def softmax_with_policy(logits: Tensor, policy: Tensor) -> Tensor:
    """Return the softmax over the tokens that a policy keeps, with a gradient for those it drops.

    Y. Rao et al. (2021), arXiv:2106.02034, section 3.3. The policy multiplies behind the
    exponential: a boolean or infinite mask, or the logarithm of a policy of 0, would pass no
    gradient to it. Rows of dropped tokens stay well defined, since every token sees itself.

    Args:
        logits: [B, H, N, N].
        policy: [B, N], from 0 to 1.

    Returns:
        [B, H, N, N] in float32: (E + eps / N) / (sum of E + eps), E_ij = exp(logits_ij) policy_j.
    """
    tokens = policy.shape[1]
    seen = policy.float()[:, None, None, :]
    own = torch.eye(tokens, device=policy.device)
    logits = logits.float()
    seen = seen + (1.0 - seen) * own  # [B, 1, N, N]
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
    return (weights + POLICY_EPS / tokens) / (weights.sum(dim=-1, keepdim=True) + POLICY_EPS)


def attention_rows(query: Tensor, key: Tensor, scale: float, size: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T * scale) of the given queries, averaged over heads.

    Args:
        query: [B, H, M, K], the M queries whose attention is wanted.
        key: [B, H, N, K].
        scale: Softmax scale.
        size: [B, N]; a key of size s counts as s equal keys.

    Returns:
        [B, M, N]; each row sums to 1.
    """
    logits = (query * scale) @ key.transpose(-2, -1)
    if size is not None:
        logits = logits + size.log()[:, None, None, :].to(logits.dtype)
    return torch.softmax(logits, dim=-1).mean(dim=1)
