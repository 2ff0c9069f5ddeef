"""Merging tokens: which go into which, and what becomes of them. Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.model.tokens import take_tokens

LEAST_NORM = 1e-12
"""Keeps a vector of zeros finite when it is normalised."""


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Which tokens are merged into which, by their positions among all N tokens.

    Attributes:
        kept: [B, N - M], tokens that stay, in the order in which they go on.
        gone: [B, M], tokens that are merged into others.
        into: [B, M], for each of these, where in `kept` the token is that takes it in.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor

    def merge(self, x: Tensor, size: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the tokens that go on, [B, N - M, D], and their sizes, [B, N - M].

        A merged token is (sum of weight * x) / (sum of weights), its size the sum of sizes; the
        others stay, bit for bit.

        Args:
            x: [B, N, D].
            size: [B, N], how many patches each token stands for.
            weight: [B, N], more than 0; by default the sizes.
        """
        by_size = weight is None
        weight = size if weight is None else weight
        weight_kept, weight_gone = weight.gather(1, self.kept), weight.gather(1, self.gone)
        total = weight_kept.scatter_add(1, self.into, weight_gone)
        share = torch.cat([weight_kept / total, weight_gone / total.gather(1, self.into)], dim=1)
        # All rows at once: with one image, the calls cost more than the rows that are moved.
        rows = take_tokens(x, torch.cat([self.kept, self.gone], dim=1))
        rows = rows * share.to(x.dtype).unsqueeze(-1)
        kept_rows, gone_rows = rows.split([self.kept.shape[1], self.gone.shape[1]], dim=1)
        into = self.into.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        merged = kept_rows.scatter_add(1, into, gone_rows)
        return merged, total if by_size else self._sums(size)

    def _sums(self, size: Tensor) -> Tensor:
        """Return the sizes of the tokens that go on, [B, N - M], of those that arrive, [B, N]."""
        return size.gather(1, self.kept).scatter_add(1, self.into, size.gather(1, self.gone))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return vectors [..., K] at length 1 in float32, so that their products are cosines."""
    vectors = vectors.float()
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(LEAST_NORM)


def token_sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """Return how many patches each token of `x` [B, N, D] stands for, [B, N]."""
    return x.new_ones(x.shape[:2]) if size is None else size
