"""Surgeon: units by the loss that is left after the others have taken over, from Kronecker factors.

Optimal Brain Surgeon for structures, in the manner of The LLM Surgeon (van der Ouderaa et al.,
2024, arXiv:2312.17244) and ZipLM (Kurtic et al., 2023, arXiv:2302.04089). The papers update the
weights by the same curvature that chose what goes; here only the scores come from it, and the
weights are solved afterwards on what the cut model really computes (`compensate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pruners.families.allocation import rank_globally
from pruners.families.options import LARGEST_SEED, option
from pruners.families.unit import UnitPruner
from pruners.model.ranking import slice_scores
from pruners.model.shape import ViTShape
from pruners.model.sites import WIDTH, block_of, kind_of
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT
from pruners.model.width import stream_readers
from pruners.saliency.kronecker import Factors, drawn_labels, kronecker_factors, true_labels
from pruners.saliency.removal import Removal, dim_costs, head_costs, shared_costs


@dataclass(frozen=True, kw_only=True)
class Surgeon(UnitPruner):
    """Removes units one at a time from the layer that reads them, the others adjusting.

    A unit's score is what it costs at its turn, in loss, at least as much as those that went before
    it; so one order serves all budgets, and all layers are ranked together. Neurons are columns of
    fc2, v dims columns of proj, a head all of its v dims; a q/k dim is a dim of the keys, which the
    logits read; a channel of the stream is a column of every qkv and fc1 and of the classifier.

    Attributes:
        labels: "true" ones, or "drawn" from the model's own answers, which needs no labels.
        damping: What is added to the inputs' covariance, as a share of its mean diagonal.
        seed: Seed of the drawn labels.
    """

    labels: Literal["true", "drawn"] = "true"
    damping: float = option(1e-2, above=0.0)
    seed: int = option(0, low=0, high=LARGEST_SEED)

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Heads, their dims, neurons, and the width."""
        return (*super().kinds(), WIDTH)

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return what each unit costs, by site.

        Raises:
            ValueError: If there are no images, or a covariance cannot be inverted.
        """
        draw = drawn_labels(torch.Generator().manual_seed(self.seed))
        labels = true_labels if self.labels == "true" else draw
        wanted = list(self.sites(vit.shape()))
        places = {name: module for site in wanted for name, module in _readers(vit, site).items()}
        factors = kronecker_factors(vit, batches, places, labels)
        scores: Scores = {}
        for site in wanted:
            try:
                scores[site] = self._costs(vit, site, factors).float()
            except ValueError as error:
                raise ValueError(f"{self.name} cannot score {site}: {error}") from error
        return scores

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Rank all units of all sites together, by score per MAC; all scores are losses."""
        steps = {site: slice_scores(scores[site]) for site in self.sites(shape)}
        return rank_globally(shape, steps, lambda shares: self.shrink(shape, shares), macs)

    def _costs(self, vit: ViT, site: str, factors: Mapping[str, Factors]) -> Tensor:
        readers = _readers(vit, site)
        if site == WIDTH:
            return shared_costs([self._removal(factors[n], r) for n, r in readers.items()])
        ((name, module),) = readers.items()
        kind, shape = kind_of(site), vit.shape().blocks[block_of(site)]
        if kind == "qk_dim":
            return key_costs(factors[name], shape.heads, self.damping)
        removal = self._removal(factors[name], module)
        if kind == "head":
            return head_costs(removal, shape.v_dim)
        return dim_costs(removal, shape.heads) if kind == "v_dim" else removal.one_by_one()

    def _removal(self, factors: Factors, module: nn.Module) -> Removal:
        assert isinstance(module, nn.Linear)
        return Removal(module.weight.detach(), factors, self.damping)


def key_costs(factors: Factors, heads: int, damping: float) -> Tensor:
    """Return what each dim of the keys costs, [H, K]; each head is a layer of its own.

    Args:
        factors: H and G of the keys of all heads, [H * K, H * K].
        heads: H, how many there are.
        damping: As in `Removal`.
    """
    size = len(factors.inputs) // heads
    costs = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        part = Factors(inputs=factors.inputs[own, own], outputs=factors.outputs[own, own])
        costs.append(Removal(torch.eye(size), part, damping).one_by_one())
    return torch.stack(costs)


def _readers(vit: ViT, site: str) -> dict[str, nn.Module]:
    """Return name -> module of what reads a site's units; keys' norm stands for the logits."""
    if site == WIDTH:
        return dict(stream_readers(vit))
    index, kind = block_of(site), kind_of(site)
    block = vit.blocks[index]
    if kind == "neuron":
        assert block.mlp is not None
        return {f"blocks.{index}.mlp.fc2": block.mlp.fc2}
    assert block.attn is not None
    if kind == "qk_dim":
        return {f"blocks.{index}.attn.keys": block.attn.k_norm}
    return {f"blocks.{index}.attn.proj": block.attn.proj}
