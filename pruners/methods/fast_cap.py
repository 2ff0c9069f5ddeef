"""FastCAP: one Fisher block per layer and a sweep over its columns (Kuznedelev et al., 2210.09223).

As in the authors' code, after SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.fisher import FisherPruner
from pruners.saliency.curvature import NO_CURVATURE, Curvature, block_size, mend


@dataclass(frozen=True, kw_only=True)
class FastCAP(FisherPruner):
    """The blocks of a layer share one Fisher matrix, the mean of theirs.

    Columns are visited from left to right; what is removed in one is compensated by the columns to
    its right. The paper gives each layer the same sparsity (`scope = "layer"`).
    """

    def curvature(self, weights: int, total: int) -> SharedBlock:
        """Return an empty shared Fisher matrix."""
        return SharedBlock(weights, total, self.block, self.damping)

    def bytes_per_weight(self, total: int) -> int:
        """The weights and their scores; the one matrix is small."""
        return 8


class SharedBlock(Curvature):
    """One Fisher matrix [B, B] for all blocks of a layer."""

    def __init__(self, weights: int, total: int, block: int, damping: float) -> None:
        """Expect `total` gradients of a layer with that many weights."""
        self.block = block_size(weights, block)
        self.total, self.damping = total, damping
        self.fisher: Tensor | None = None
        self.upper = torch.empty(0)  # U with F^-1 = U^T U

    def add(self, gradients: Tensor) -> None:
        """Take in gradients [c, d]."""
        g = gradients.reshape(-1, self.block)  # [c R, B]
        blocks = gradients.shape[1] // self.block
        part = g.T @ g / (self.total * blocks)
        self.fisher = part if self.fisher is None else self.fisher + part

    def check(self, site: str) -> None:
        """Factorise, and refuse what float32 cannot.

        Raises:
            ValueError: That names the layer and what would mend it.
        """
        if self.fisher is None:
            raise ValueError(f"{site} got no gradients; give at least one batch of images")
        mean = float(self.fisher.diagonal().mean())
        damped = self.fisher.double()
        damped.diagonal().add_(self.damping * mean or NO_CURVATURE)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            raise ValueError(
                f"the Fisher matrix of {site} is not positive definite with damping = "
                f"{self.damping:g}; {mend(self.damping)}"
            )
        inverse = torch.cholesky_inverse(factor)
        self.upper = torch.linalg.cholesky(inverse, upper=True).to(self.fisher.dtype)

    def scores(self, weights: Tensor) -> Tensor:
        """Return w^2 / (2 U_jj^2) [d], the loss of removing a weight while those before it stay."""
        return (0.5 * weights.view(-1, self.block) ** 2 / self.upper.diagonal() ** 2).flatten()

    def update(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Sweep the columns: the error of each is compensated by the columns to its right; [d]."""
        w, kept = weights.view(-1, self.block).clone(), keep.view(-1, self.block)
        for column in range(self.block):
            error = w[:, column].masked_fill(kept[:, column], 0.0) / self.upper[column, column]
            w[:, column:] -= error.unsqueeze(1) * self.upper[column, column:]
        return (w * kept).flatten()
