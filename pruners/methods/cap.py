"""CAP: correlation-aware pruning (Kuznedelev et al., 2023, arXiv:2210.09223)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.fisher import FisherPruner
from pruners.saliency.curvature import InverseFisher


@dataclass(frozen=True, kw_only=True)
class CAP(FisherPruner):
    """Removes the weights of a block one at a time, updating saliencies and inverse after each.

    A weight's score is the cumulative loss of its block at the time it leaves, so that a global
    threshold selects a prefix of every block's order. The weights that stay move to the exact
    minimum of the quadratic model for the set that left.
    """

    def curvature(self, weights: int, total: int) -> GreedyOBS:
        """Return an empty inverse Fisher matrix."""
        return GreedyOBS(weights, total, self.block, self.damping)

    def bytes_per_weight(self, total: int) -> int:
        """The inverse in float32, and one more while it is updated or eliminated."""
        return 8 * self.block


class GreedyOBS(InverseFisher):
    """Optimal Brain Surgeon, one weight of every block at a time."""

    def scores(self, weights: Tensor) -> Tensor:
        """Return the cumulative loss of the block when each weight leaves, [d] (algorithm 1)."""
        return eliminate(self.blocks(weights), self.matrix).flatten()

    def update(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Return the minimum [d] of the quadratic model with the removed weights at zero."""
        return compensate(self.blocks(weights), self.matrix, self.blocks(keep)).flatten()


def eliminate(weights: Tensor, inverse: Tensor) -> Tensor:
    """Remove all weights of all blocks, greedily, and return the loss at which each one left.

    Args:
        weights: [R, B].
        inverse: [R, B, B], the inverse Fisher matrices; they are not changed.

    Returns:
        [R, B], cumulative losses; weights that are zero already leave first, at 0.
    """
    w, finv = weights.clone(), inverse.clone()
    rows = torch.arange(len(w), device=w.device)
    gone = torch.zeros_like(w, dtype=torch.bool)
    loss, scores = torch.zeros_like(w[:, 0]), torch.zeros_like(w)
    for _ in range(w.shape[1]):
        # Divisions by the rows of removed weights, which are zero, are masked out.
        diagonal = finv.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(w.dtype).tiny)
        saliency = (0.5 * w**2 / diagonal).masked_fill(gone, float("inf"))  # [R, B]
        cheapest = saliency.argmin(dim=1)  # [R]
        loss = loss + saliency[rows, cheapest]
        scores[rows, cheapest] = loss
        column = finv[rows, :, cheapest] / diagonal[rows, cheapest].unsqueeze(1)  # [R, B]
        w = w - column * w[rows, cheapest].unsqueeze(1)
        finv.baddbmm_(column.unsqueeze(2), finv[rows, cheapest].unsqueeze(1), alpha=-1.0)
        gone[rows, cheapest] = True
        w = w.masked_fill(gone, 0.0)
    return scores


def compensate(weights: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
    """Return w - F^-1[:, P] (F^-1[P, P])^-1 w_P with P, the removed weights, exactly zero.

    The update depends only on the set P, not on the order in which it left.

    Args:
        weights: [R, B].
        inverse: [R, B, B].
        keep: [R, B], False for P.
    """
    removed = (~keep).to(weights.dtype)
    # F^-1 on P, the identity elsewhere: one solve for blocks with sets P of different sizes.
    system = inverse * removed.unsqueeze(1) * removed.unsqueeze(2) + torch.diag_embed(1 - removed)
    multipliers = torch.linalg.solve(system, (weights * removed).unsqueeze(2))
    return (weights - (inverse @ multipliers).squeeze(2)) * keep
