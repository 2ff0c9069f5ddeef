"""Multi-head self-attention in which q/k and v may have widths of their own.

timm's `Attention` has one head width for q, k and v and derives the softmax scale from it, so it
cannot express a pruned
attention: cutting q/k dims would change the temperature. This module keeps timm's parameter names
and takes over timm's own layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Attended:
        """Attend. `x` is [B, N, D]."""
        qk, v_width = self.heads * self.qk_dim, self.heads * self.v_dim
        q, k, v = self.qkv(x).split([qk, qk, v_width], dim=-1)
        q = self.q_norm(self._by_head(q, self.qk_dim))  # [B, H, N, K]
        k = self.k_norm(self._by_head(k, self.qk_dim))
        v = self._by_head(v, self.v_dim)  # [B, H, N, V]
        mixed = self._fused(q, k, v) if self.fused_attn else self._unfused(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, N, H * V]
        return Attended(self.proj_drop(self.proj(self.norm(mixed))), q, k)

    def _by_head(self, x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (self.heads, width)).transpose(1, 2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, N]
        return self.attn_drop(weights) @ v


def attention_rows(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) of the given queries, averaged over heads.

    Args:
        query: [B, H, M, K], the M queries whose attention is wanted.
        key: [B, H, N, K].
        scale: Softmax scale.

    Returns:
        [B, M, N]; each row sums to 1.
    """
    return torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1).mean(dim=1)
