"""WoodFisher: block-wise OBS, all weights removed at once (Singh & Alistarh, 2020, 2004.14340)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pruners.families.fisher import FisherPruner
from pruners.saliency.curvature import InverseFisher


@dataclass(frozen=True, kw_only=True)
class WoodFisher(FisherPruner):
    """Saliency w_i^2 / (2 F^-1_ii); the others move by the sum of the single updates.

    The sum counts what correlated removed weights share more than once; `cap` does not.
    """

    def curvature(self, weights: int, total: int) -> SimultaneousOBS:
        """Return an empty inverse Fisher matrix."""
        return SimultaneousOBS(weights, total, self.block, self.damping)

    def bytes_per_weight(self, total: int) -> int:
        """The inverse in float32, and one more while it is updated."""
        return 8 * self.block


class SimultaneousOBS(InverseFisher):
    """Optimal Brain Surgeon for single weights, applied to all removed weights at once."""

    def scores(self, weights: Tensor) -> Tensor:
        """Return w_i^2 / (2 F^-1_ii) of the weights [d], [d] (eq. 4)."""
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        return (0.5 * self.blocks(weights) ** 2 / diagonal).flatten()

    def update(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Add -F^-1 (w_P / diag(F^-1)_P), P the removed ones of [d], which become zero (eq. 5)."""
        w, kept = self.blocks(weights), self.blocks(keep)
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        removed = (w / diagonal).masked_fill(kept, 0.0)  # [R, B]
        moved = w - (self.matrix @ removed.unsqueeze(2)).squeeze(2)
        return (moved * kept).flatten()
