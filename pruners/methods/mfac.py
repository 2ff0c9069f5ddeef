"""M-FAC: WoodFisher's estimate without forming the matrix (Frantar et al., 2021, 2107.03356)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.fisher import FisherPruner
from pruners.saliency.curvature import NO_CURVATURE, Curvature, block_size, mend


@dataclass(frozen=True, kw_only=True)
class MFAC(FisherPruner):
    """As `woodfisher`, for larger blocks: memory is m per weight instead of B.

    The paper computes products with F^-1 by a recursion over the gradients; here the same products
    come from a Cholesky factor of their Gram matrix, which batches better.
    """

    block: int = 2048

    def curvature(self, weights: int, total: int) -> MatrixFree:
        """Return an empty set of gradients."""
        return MatrixFree(weights, total, self.block, self.damping)

    def bytes_per_weight(self, total: int) -> int:
        """The gradients in float32, and once more solved against their Gram matrix."""
        return 8 * total


class MatrixFree(Curvature):
    """Products with the inverse Fisher matrix of each block, from the gradients themselves.

    F^-1 = (I - G^T (m lambda I + G G^T)^-1 G) / lambda, with G [m, B] (Woodbury).
    """

    def __init__(self, weights: int, total: int, block: int, damping: float) -> None:
        """Expect `total` gradients of a layer with that many weights."""
        self.block = block_size(weights, block)
        self.total, self.damping, self.scale = total, damping, 1.0
        self.gradients: list[Tensor] = []
        self.half = torch.empty(0)  # L^-1 G per block, [R, m, B], L L^T = m lambda I + G G^T

    def add(self, gradients: Tensor) -> None:
        """Keep gradients [c, d]."""
        self.gradients.append(gradients)

    def check(self, site: str) -> None:
        """Factorise, and refuse what float32 cannot.

        Raises:
            ValueError: That names the layer and what would mend it.
        """
        if not self.gradients:
            raise ValueError(f"{site} got no gradients; give at least one batch of images")
        g = torch.cat(self.gradients)
        self.gradients = []
        mean = float(g.square().mean())
        self.scale = self.damping * mean or NO_CURVATURE
        g = g.view(len(g), -1, self.block).transpose(0, 1)  # [R, m, B]
        gram = g @ g.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(self.total * self.scale)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            raise ValueError(
                f"Fisher block {int(failed.nonzero()[0])} of {site} is not positive definite "
                f"with damping = {self.damping:g}; {mend(self.damping)}"
            )
        self.half = torch.linalg.solve_triangular(factor, g, upper=False)

    def diagonal(self) -> Tensor:
        """Return the diagonal of F^-1, [d]."""
        return ((1.0 - self.half.square().sum(dim=1)) / self.scale).flatten()

    def product(self, vector: Tensor) -> Tensor:
        """Return F^-1 x for a vector [d]."""
        x = vector.view(-1, self.block, 1)  # [R, B, 1]
        return ((x - self.half.transpose(1, 2) @ (self.half @ x)) / self.scale).flatten()

    def scores(self, weights: Tensor) -> Tensor:
        """Return w_i^2 / (2 F^-1_ii) of the weights [d], [d]."""
        return 0.5 * weights**2 / self.diagonal()

    def update(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Add -F^-1 (w_P / diag(F^-1)_P), P the removed ones of [d], which become zero."""
        removed = (weights / self.diagonal()).masked_fill(keep, 0.0)
        return (weights - self.product(removed)) * keep
