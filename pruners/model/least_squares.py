"""Ridge regression from running sums: what a linear layer's weights should be on what it gets.

Sums are held in float64; the products in them are those of the inputs' own precision, around a
first guess of the means, so that large means do not drown small covariances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_DAMPING = 1e-30
"""Keeps a system solvable whose inputs are all constant; they are given no weight then."""


class Correction(NamedTuple):
    """What is added to a linear layer.

    Attributes:
        weight: [out, in].
        bias: [out].
    """

    weight: Tensor
    bias: Tensor


class Moments:
    """Sums over tokens of inputs a [n, in], of targets y [n, out], and of their products.

    Attributes:
        count: Tokens that were added.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: a, [n, in].
            targets: y, [n, out]; None where only the inputs are of interest.
        """
        if targets is None:
            targets = inputs[:, :0]
        if self._shift is None:
            self._shift = inputs.mean(dim=0), targets.mean(dim=0)
        a, y = inputs - self._shift[0], targets - self._shift[1]
        found = [a.sum(dim=0), y.sum(dim=0), a.T @ a, y.T @ a]
        if not self._sums:
            self._sums = [each.double() for each in found]
        else:
            for total, each in zip(self._sums, found, strict=True):
                total += each
        self.count += len(inputs)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of a, [in], and of y, [out], in float64."""
        assert self._shift is not None
        a, y = self._sums[:2]
        return self._shift[0].double() + a / self.count, self._shift[1].double() + y / self.count

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Return the covariances of a with a, [in, in], and of y with a, [out, in], in float64."""
        a, y, aa, ya = self._sums
        return (
            aa / self.count - torch.outer(a, a) / self.count**2,
            ya / self.count - torch.outer(y, a) / self.count**2,
        )

    def correction(self, damping: float, *, biased: bool = True) -> Correction | None:
        """Return the D, c that minimise mean |y - D a - c|^2 + damping * s |D|^2.

        s is the mean variance of the inputs, so that the damping means the same for any layer.

        Args:
            damping: Relative damping.
            biased: Whether there is a c; without one it is 0, and s the inputs' mean square.

        Returns:
            In float64; None if the system is not positive definite.
        """
        mean_a, mean_y = self.means()
        aa, ya = self.covariances()
        if not biased:
            aa, ya = aa + torch.outer(mean_a, mean_a), ya + torch.outer(mean_y, mean_a)
        weight = ridge(aa, ya, damping)
        if weight is None:
            return None
        bias = mean_y - weight @ mean_a if biased else torch.zeros_like(mean_y)
        return Correction(weight, bias)


def ridge(aa: Tensor, ya: Tensor, damping: float) -> Tensor | None:
    """Return ya (aa + damping * s I)^-1, s the mean diagonal of aa.

    Args:
        aa: [in, in], symmetric.
        ya: [out, in].
        damping: Relative damping.

    Returns:
        [out, in]; None if the damped matrix is not positive definite.
    """
    scale = aa.diagonal().mean().clamp_min(0.0)
    damped = aa + (damping * scale).clamp_min(LEAST_DAMPING) * torch.eye(len(aa)).to(aa)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        return None
    return torch.cholesky_solve(ya.T, factor).T
