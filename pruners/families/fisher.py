"""Weight methods that use blocks of the Fisher matrix and move the weights that stay.

What they share: gathering gradients group by group of layers, so that the curvature of only a few
is in memory at a time; the choice of the masks; and putting all new weights in place at once, so
that every layer's curvature is that of the model before the cut.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.families.options import option
from pruners.families.weight import WeightPruner
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT
from pruners.saliency.curvature import Curvature, gradient_chunks, layer_groups


@dataclass(frozen=True, kw_only=True)
class FisherPruner(WeightPruner, abc.ABC):
    """A method that scores and updates the weights of a layer by their Fisher matrix.

    Attributes:
        block: Smallest number of weights of a block; a layer takes the next divisor of its size.
        damping: lambda as a share of the mean diagonal of the layer's Fisher matrix (of the first
            gradients). The papers give absolute values (1e-8 to 1e-6) for mean gradients of large
            batches; relative ones mean the same for any model and batch.
        gradient_batch: Images whose mean is one gradient. The papers take 128 or more and thousands
            of gradients; with a few hundred images, one each gives the most gradients.
        memory_gb: Memory for curvature, in 1e9 bytes; more means fewer passes over the images.
    """

    block: int = option(64, low=1)
    damping: float = option(1e-2, above=0.0)
    gradient_batch: int = option(1, low=1)
    memory_gb: float = option(1.0, above=0.0)

    @abc.abstractmethod
    def curvature(self, weights: int, total: int) -> Curvature:
        """Return an empty curvature for a layer with that many weights and `total` gradients."""

    @abc.abstractmethod
    def bytes_per_weight(self, total: int) -> int:
        """Return the memory that the curvature takes, per weight, with `total` gradients."""

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return the scores of all weights; `vit` is left as it was."""
        layers = dict(vit.linears())
        return {
            site: curvature.scores(weights).view_as(layers[site].weight)
            for site, curvature, weights in self._curvatures(vit, batches)
        }

    def prune_once(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Choose the masks by the scores, and move the weights that stay."""
        target, layers = self.shrink(vit.shape(), thresholds), dict(vit.linears())
        moved: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for site, curvature, weights in self._curvatures(vit, batches):
            if thresholds.get(site, 0.0) > 0.0 and site in target.nonzero:
                shape = layers[site].weight.shape
                scores = curvature.scores(weights).view(shape)
                masks[site] = self.mask(vit, site, scores, target.nonzero[site])
                moved[site] = curvature.update(weights, masks[site].flatten()).view(shape)
        with torch.no_grad():
            for site, weights in moved.items():
                vit.masks[site] = masks[site]
                layers[site].weight.copy_(weights)

    def _curvatures(self, vit: ViT, batches: Batches) -> Iterator[tuple[str, Curvature, Tensor]]:
        """Yield (site, curvature, weights [d]) layer by layer."""
        batches = list(batches)
        total = sum(len(labels) // self.gradient_batch for _, labels in batches)
        if total == 0:
            raise ValueError(
                f"{self.name} got fewer images than gradient_batch = {self.gradient_batch}; "
                "give more calibration images"
            )
        layers = dict(vit.linears())
        sizes = {site: layer.weight.numel() for site, layer in layers.items()}
        for sites in layer_groups(sizes, self.bytes_per_weight(total), self.memory_gb * 1e9):
            curvatures = {site: self.curvature(sizes[site], total) for site in sites}
            for chunk in gradient_chunks(vit, batches, sites, self.gradient_batch):
                for site, gradients in chunk.items():
                    curvatures[site].add(gradients.float())
            for site in sites:
                curvature = curvatures.pop(site)  # its memory goes as soon as it is used
                curvature.check(site)
                yield site, curvature, layers[site].weight.detach().float().flatten()
