"""A linear layer whose weights are solved anew, and how its output enters the residual stream."""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import LayerScale
from torch import Tensor, nn

from pruners.model.least_squares import Moments

LEAST_SCALE = 1e-3
"""A channel whose LayerScale is a smaller share of the largest is left as it is."""


class Layer(NamedTuple):
    """A linear layer of the cut model.

    Attributes:
        name: Its name in the model.
        linear: The layer, in float32 or float64.
    """

    name: str
    linear: nn.Linear

    def add(self, weight: Tensor | None, bias: Tensor) -> None:
        """Add to the weights, [out, in], and to the bias if there is one, [out]."""
        if weight is not None:
            self.linear.weight.add_(weight.to(self.linear.weight))
        if self.linear.bias is not None:
            self.linear.bias.add_(bias.to(self.linear.bias))

    def solve(self, moments: Moments, damping: float) -> None:
        """Add what its output lacks, as far as its inputs tell.

        Raises:
            ValueError: If the system cannot be solved.
        """
        found = moments.correction(damping, biased=self.linear.bias is not None)
        if found is None:
            raise self.unsolvable(damping)
        self.add(found.weight, found.bias)

    def unsolvable(self, damping: float) -> ValueError:
        """Return the error of a system that cannot be solved."""
        return ValueError(
            f"{self.name} cannot be solved anew with damping = {damping:g} on these images; give "
            "other or more calibration images, or compensate = false"
        )


class Writer(NamedTuple):
    """The layer of a branch that writes to the stream.

    Attributes:
        layer: The layer.
        scale: The module behind it.
        rows: The channels it writes to, [out], or None for all.
    """

    layer: Layer
    scale: nn.Module
    rows: Tensor | None

    def lacks(self, wanted: Tensor, have: Tensor) -> Tensor:
        """Return by how much its output [..., out] must grow to make a stream [..., D] another."""
        lacks = wanted - have
        if self.rows is not None:
            lacks = lacks[..., self.rows]
        if not isinstance(self.scale, LayerScale):
            return lacks
        gamma = self.scale.gamma
        small = gamma.abs() < LEAST_SCALE * gamma.abs().max()
        return lacks / gamma.masked_fill(small, float("inf"))

    def stream(self, output: Tensor, x: Tensor) -> Tensor:
        """Return a stream x [B, N, D] to which an output [..., out] was added."""
        grown: Tensor = self.scale(output)
        if self.rows is None:
            return x + grown
        return x.index_add(2, self.rows, grown.expand(*x.shape[:2], -1))
