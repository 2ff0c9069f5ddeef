"""What it costs to remove the inputs of a linear layer, one after another, the others adjusting.

Optimal Brain Surgeon for structures: ZipLM (Kurtic et al., 2023, arXiv:2302.04089), The LLM Surgeon
(van der Ouderaa et al., 2024, arXiv:2312.17244). With the layer's weights W, the covariance H of
its inputs and the curvature G of its outputs, removing the inputs s after the others have adjusted
costs 1/2 tr(((H^-1)_ss)^-1 W_s^T G W_s) of loss; then

    W -= W_s ((H^-1)_ss)^-1 (H^-1)_s:,    H^-1 -= (H^-1)_:s ((H^-1)_ss)^-1 (H^-1)_s:.

So the second of two inputs that say the same becomes dear once the first has gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruners.saliency.kronecker import Factors

ORDERED = 1e-6
"""By what share a score is above the one before it at least, so that scores tell the order."""

COMPACTED = 64
"""Removals after which what is left is copied together, so that later steps are smaller."""


class Removal:
    """A layer from which inputs are removed.

    Attributes:
        inverse: H^-1, [in, in], of the inputs that are left.
        weight: G^(1/2) W, [out, in].
        left: [in], their numbers.
    """

    def __init__(self, weight: Tensor, factors: Factors, damping: float) -> None:
        """Start with all inputs.

        Args:
            weight: W, [out, in].
            factors: H and G.
            damping: What is added to H's diagonal, as a share of its mean.

        Raises:
            ValueError: If H or G is not finite, or H cannot be inverted with that damping.
        """
        h = factors.inputs
        if not bool(torch.isfinite(h).all() & torch.isfinite(factors.outputs).all()):
            raise ValueError("curvature is not finite; give a model and images whose loss is")
        scale = h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny)
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        factor, failed = torch.linalg.cholesky_ex(h / scale + damping * eye)
        if bool(failed):
            raise ValueError(
                f"inputs are not positive definite with damping = {damping:g}; give a larger one"
            )
        self.inverse = torch.cholesky_inverse(factor) / scale
        values, vectors = torch.linalg.eigh(factors.outputs)
        root = values.clamp_min(0.0).sqrt().unsqueeze(1) * vectors.T
        self.weight = root @ weight.to(root)
        self.left = torch.arange(len(h), device=h.device)

    def costs(self) -> Tensor:
        """Return what removing each input that is left would cost, [in]."""
        return 0.5 * self.weight.square().sum(dim=0) / self.inverse.diagonal()

    def group_costs(self, size: int) -> Tensor:
        """Return what removing each run of `size` inputs that are left would cost, [in / size]."""
        groups = len(self.left) // size
        parted = self.inverse.view(groups, size, groups, size)
        blocks = parted.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [n, size, size]
        columns = self.weight.unflatten(1, (groups, size)).transpose(0, 1)  # [n, out, size]
        gram = columns.transpose(1, 2) @ columns
        return 0.5 * torch.linalg.solve(blocks, gram).diagonal(dim1=1, dim2=2).sum(dim=1)

    def remove(self, index: Tensor) -> None:
        """Remove the inputs at `index` [n], positions among those that are left."""
        rows = self.inverse[index]  # [n, in]
        share = torch.linalg.solve(rows[:, index], rows)  # [n, in]
        self.weight = self.weight - self.weight[:, index] @ share
        self.inverse = self.inverse - rows.T @ share
        keep = torch.ones(len(self.left), dtype=torch.bool, device=self.left.device)
        self._keep(keep.index_fill(0, index, False))

    def remove_one(self, index: int) -> None:
        """Remove the input at a position among those that are left."""
        self._zero(index)
        keep = torch.ones(len(self.left), dtype=torch.bool, device=self.left.device)
        keep[index] = False
        self._keep(keep)

    def one_by_one(self) -> Tensor:
        """Remove all inputs, the cheapest first; return what each one cost, [in], ever rising."""
        costs = self.inverse.new_zeros(len(self.left))
        reached = self.inverse.new_zeros(())
        while len(self.left):
            gone = torch.zeros(len(self.left), dtype=torch.bool, device=self.left.device)
            for _ in range(min(COMPACTED, len(self.left))):
                cost = self.costs().masked_fill_(gone, float("inf"))
                cheapest = int(cost.argmin())
                reached = _next(reached, cost[cheapest])
                costs[self.left[cheapest]] = reached
                self._zero(cheapest)
                gone[cheapest] = True
            self._keep(~gone)
        return costs

    def _zero(self, index: int) -> None:
        """Remove an input but leave its place, where the inverse is the identity."""
        row = self.inverse[index].clone()
        share = row / row[index]
        self.weight.addr_(self.weight[:, index].clone(), share, alpha=-1.0)
        self.inverse.addr_(row, share, alpha=-1.0)
        self.inverse[index, index] = 1.0

    def _keep(self, keep: Tensor) -> None:
        self.inverse, self.weight = self.inverse[keep][:, keep], self.weight[:, keep]
        self.left = self.left[keep]


def head_costs(removal: Removal, size: int) -> Tensor:
    """Return what each run of `size` inputs costs when it goes, the cheapest first, [in / size]."""
    costs = removal.inverse.new_zeros(len(removal.left) // size)
    reached = removal.inverse.new_zeros(())
    while len(removal.left):
        cost = removal.group_costs(size)
        cheapest = int(cost.argmin())
        reached = _next(reached, cost[cheapest])
        place = torch.arange(size, device=removal.left.device) + cheapest * size
        costs[removal.left[place[0]] // size] = reached
        removal.remove(place)
    return costs


def dim_costs(removal: Removal, heads: int) -> Tensor:
    """Return what each dim of each head costs when it goes, [heads, dims].

    In each round every head loses its cheapest dim.
    """
    size = len(removal.left) // heads
    costs = removal.inverse.new_zeros(heads, size)
    reached = removal.inverse.new_zeros(heads)
    for left in range(size, 0, -1):
        for head in range(heads):
            # The heads in front have lost one already.
            start = head * (left - 1)
            cost = removal.costs()[start : start + left]
            cheapest = int(cost.argmin())
            reached[head] = _next(reached[head], cost[cheapest])
            costs[head, removal.left[start + cheapest] % size] = reached[head]
            removal.remove_one(start + cheapest)
    return costs


def _next(reached: Tensor, cost: Tensor) -> Tensor:
    """Return the score of what goes next: what it costs, but more than what went before."""
    return torch.maximum(reached * (1.0 + ORDERED), cost)


def shared_costs(removals: Sequence[Removal]) -> Tensor:
    """Return what inputs that several layers share cost when they go, the cheapest first, [in].

    Args:
        removals: The layers, each with the same inputs; what one costs is summed over them.
    """
    left = len(removals[0].left)
    costs = removals[0].inverse.new_zeros(left)
    reached = removals[0].inverse.new_zeros(())
    for _ in range(left):
        cost = torch.stack([removal.costs() for removal in removals]).sum(dim=0)
        cheapest = int(cost.argmin())
        reached = _next(reached, cost[cheapest])
        costs[removals[0].left[cheapest]] = reached
        for removal in removals:
            removal.remove_one(cheapest)
    return costs
