"""The empirical Fisher matrix of a layer's weights, block by block, and its inverse.

A weight matrix is flattened row by row and cut into R consecutive blocks of B weights; each block
has a Fisher matrix of its own, F = lambda I + (1/m) sum_k g_k g_k^T over m gradients. Correlations
between blocks are ignored (Singh & Alistarh, 2020, arXiv:2004.14340; Kuznedelev et al., 2023,
arXiv:2210.09223).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pruners.model.types import Batches
from pruners.model.vit import ViT
from pruners.saliency.gradients import check_layers, evaluating, sample_gradients

NO_CURVATURE = 1e-12
"""Damping of a layer whose gradients are all zero: its weights cost next to nothing."""

_MOST_GRADIENT_BYTES = 256e6  # of the gradients that are held at a time


def block_size(weights: int, wanted: int) -> int:
    """Return the smallest divisor of the number of weights that is >= `wanted`."""
    return next(size for size in range(min(wanted, weights), weights + 1) if weights % size == 0)


def mend(damping: float) -> str:
    """Say which damping mends a matrix that float32 cannot invert."""
    return f"give damping = {max(10 * damping, 1e-3):g} or more"


def layer_groups(sizes: Mapping[str, int], bytes_per_weight: int, limit: float) -> list[list[str]]:
    """Split layers into runs whose curvature fits into `limit` bytes, or that are one layer."""
    groups: list[list[str]] = []
    used = limit
    for site, weights in sizes.items():
        need = weights * bytes_per_weight
        if used + need > limit:
            groups.append([])
            used = 0.0
        groups[-1].append(site)
        used += need
    return groups


def gradient_chunks(
    vit: ViT, batches: Batches, sites: list[str], per_gradient: int
) -> Iterator[dict[str, Tensor]]:
    """Yield site -> gradients [c, d] of a few images at a time, masked weights' entries zero.

    Args:
        vit: The model.
        batches: Calibration images.
        sites: The layers wanted.
        per_gradient: Images whose mean is one gradient; a last, smaller group is left out.

    Raises:
        ValueError: If a weight is frozen, or a layer got no gradient at all.
    """
    layers = {site: layer for site, layer in vit.linears() if site in sites}
    check_layers(layers)
    size = 4 * sum(layer.weight.numel() for layer in layers.values())
    step = max(1, int(_MOST_GRADIENT_BYTES // (size * per_gradient))) * per_gradient
    device = next(vit.parameters()).device
    with evaluating(vit):
        for images, labels in batches:
            for start in range(0, len(labels) // per_gradient * per_gradient, step):
                few = slice(start, min(start + step, len(labels) // per_gradient * per_gradient))
                found = sample_gradients(vit, images[few].to(device), labels[few].to(device), sites)
                yield {site: _flat(vit, site, g, per_gradient) for site, g in found.items()}


class Curvature(abc.ABC):
    """What a method keeps of the gradients of one layer, and what it concludes from it.

    A layer's weights are handled as a vector [d], flattened row by row.
    """

    @abc.abstractmethod
    def add(self, gradients: Tensor) -> None:
        """Take in gradients [c, d]."""

    @abc.abstractmethod
    def scores(self, weights: Tensor) -> Tensor:
        """Return the scores [d] of the weights [d]; higher is kept."""

    @abc.abstractmethod
    def update(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Return the weights [d] after removing all but `keep` [d, bool]; the others may move."""

    @abc.abstractmethod
    def check(self, site: str) -> None:
        """Refuse curvature that could not be computed; it comes before scores and updates.

        Raises:
            ValueError: That names the layer and what would mend it.
        """


class InverseFisher(Curvature, abc.ABC):
    """The inverse Fisher matrix of each block, [R, B, B]; of masked weights it is diagonal."""

    def __init__(self, weights: int, total: int, block: int, damping: float) -> None:
        """Expect `total` gradients of a layer with that many weights."""
        self.block = block_size(weights, block)
        self.total, self.damping = total, damping
        self.inverse: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Take in gradients [c, d]; the first ones set the scale of the damping."""
        if self.inverse is None:
            self.inverse = self._undisturbed(gradients)
        self.inverse = update_inverse(self.inverse, gradients, self.total)

    def check(self, site: str) -> None:
        """Refuse an inverse that float32 could not compute.

        Raises:
            ValueError: That names the layer and what would mend it.
        """
        if self.inverse is None:
            raise ValueError(
                f"{site} got no gradients; give at least one batch of calibration images"
            )
        diagonal = self.inverse.diagonal(dim1=1, dim2=2)
        sound = torch.isfinite(diagonal).all(1) & (diagonal > 0).all(1)
        if not bool(sound.all()):
            block = int((~sound).nonzero()[0])
            raise ValueError(
                f"Fisher block {block} of {site} is not positive definite with damping = "
                f"{self.damping:g}; {mend(self.damping)}"
            )

    def blocks(self, vector: Tensor) -> Tensor:
        """View a vector [d] as blocks [R, B]."""
        return vector.view(-1, self.block)

    @property
    def matrix(self) -> Tensor:
        """The inverse, [R, B, B]."""
        if self.inverse is None:
            raise AssertionError("check comes before use")
        return self.inverse

    def _undisturbed(self, gradients: Tensor) -> Tensor:
        mean = float(gradients.float().square().mean())
        scale = self.damping * mean or NO_CURVATURE
        blocks = gradients.shape[1] // self.block
        identity = torch.eye(self.block, device=gradients.device, dtype=torch.float32)
        return (identity / scale).repeat(blocks, 1, 1)


def update_inverse(inverse: Tensor, gradients: Tensor, total: int) -> Tensor:
    """Add gradients to a Fisher matrix, given and returned as its inverse.

    Sherman-Morrison-Woodbury for c gradients at once; with c = 1 it is the recursion of WoodFisher
    (Singh & Alistarh, 2020, arXiv:2004.14340, eq. 8).

    Args:
        inverse: [R, B, B].
        gradients: [c, R * B].
        total: m, the number of all gradients, whose mean the Fisher matrix is.

    Returns:
        [R, B, B].
    """
    blocks, size, _ = inverse.shape
    g = gradients.to(inverse.dtype).view(-1, blocks, size).transpose(0, 1)  # [R, c, B]
    v = g @ inverse  # [R, c, B]
    small = v @ g.transpose(1, 2)  # [R, c, c]
    small.diagonal(dim1=1, dim2=2).add_(total)
    factor, failed = torch.linalg.cholesky_ex(small)
    if bool(failed.any()):
        return torch.full_like(inverse, float("nan"))  # `check` says what would mend it
    half = torch.linalg.solve_triangular(factor, v, upper=False)  # [R, c, B]
    return torch.baddbmm(inverse, half.transpose(1, 2), half, alpha=-1.0)


def _flat(vit: ViT, site: str, gradients: Tensor, per_gradient: int) -> Tensor:
    """Gradients [c, d] out of per-image ones [B, out, in]."""
    flat = gradients.flatten(1)
    if per_gradient > 1:
        flat = flat.view(-1, per_gradient, flat.shape[1]).mean(1)
    if site in vit.masks:
        flat = flat * vit.masks[site].to(flat.device).flatten()
    return flat
