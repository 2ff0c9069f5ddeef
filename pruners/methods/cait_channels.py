"""CAIT-style channel pruning: consistent, dynamic, under one budget. A reconstruction.

A. Wang et al. (2023), CAIT, arXiv:2309.15755; neither text nor code could be read.

Known from its abstracts: channels are pruned dynamically, those of attention under two constraints,
head-level and attention-level consistency, so that what is left is fast. Designed, to those ends:

- *Attention-level consistency*: q and k meet only in their product, so a dim leaves both; a dim of
  v leaves with its column of `proj`. *Head-level consistency*: all heads of a block lose the same
  number of dims, each at positions of its own, so that they stay one batched product.
- *Importance*: with xi = 1 on every channel's activation a (of q for q and k), I = mean over images
  of |dL/dxi| = |sum over tokens of a dL/da|, and of that a moving average over steps.
- *Selection*: the k-th weakest channel of every head of a site is one slice; slices of all sites go
  in order of importance per multiply-add saved. `allocate` and the run share it.
- *Dynamics*: masks are decided anew every few steps, for a budget that falls along a cubic. Until
  the last decision the forward pass computes m * a, and the backward pass the derivative of xi * a
  at xi = 1, as if nothing were masked. So xi gets a dL/da, the rows of q, v and fc1 that write a
  masked channel get all of dL/da and learn on, and a channel that was masked wrongly comes back.
  What reads it (k, columns of proj and fc2) is fed zeros and has no gradient; layers below get the
  gradient of masked paths too.
- From the last decision on nothing can come back, and gradient through paths that are gone would
  only bias the layers below: masks are then plain factors, with their true gradient.
- The loss is cross-entropy + `distill` * KL(dense model || student).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.families.allocation import rank_globally
from pruners.families.learned import Learned, LearnedPruner, UnitLearner, model_tensors
from pruners.families.options import option
from pruners.model.cost import cost_of
from pruners.model.gates import SLOTS, Gate, remove_gates
from pruners.model.ranking import highest, slice_scores
from pruners.model.shape import ViTShape
from pruners.model.sites import block_of, kind_of
from pruners.model.types import Scores, Thresholds
from pruners.model.vit import Block, ViT
from pruners.training.learner import LearningData
from pruners.training.optimisation import (
    autocast,
    backward,
    clip_and_step,
    decayed,
    distillation,
    schedule_factor,
    set_lr,
)

GATED = {"qk_dim": "query", "v_dim": "mixed", "neuron": "neuron"}
"""Kind of unit -> the slot its channels pass. Scaling q or k is the same, so k needs no gate."""


@dataclass(frozen=True, kw_only=True)
class CaitChannels(LearnedPruner):
    """Masks the channels that matter least while the weights train, and lets them come back.

    The scores are those of the last decision: `allocate` at the learned budget repeats it.

    Attributes:
        budget: Share of the dense multiply-adds of the whole network that is learned for. Where the
            floors do not let it be met, the run masks down to the floors.
        decisions: Times that the masks are decided in a run, at equal distances. A number, no
            interval: the 100 steps that suit long runs leave one or two in some hundred steps; 20
            are one every 8 of 250 steps, about as long as the average remembers.
        ramp: Part of the run after which the budget is reached and the masks stay.
        ema: Factor of the moving average of importances. The first steps are averaged plainly.
        distill: Weight of the divergence from the dense model in the loss; 0 needs no teacher.
        least_dims: Dims that each head keeps, of q and k and of v; smaller heads lose none.
        least_neurons: Share of the neurons that each block keeps.
        lr: Peak learning rate of the weights.
    """

    units: tuple[str, ...] = ("qk_dim", "v_dim", "neuron")
    budget: float = option(0.5, above=0.0, below=1.0)
    decisions: int = option(20, low=1)
    ramp: float = option(0.65, low=0.05, high=1.0)
    ema: float = option(0.9, low=0.0, high=1.0)
    distill: float = option(0.5, low=0.0)
    least_dims: int = option(8, low=1)
    least_neurons: float = option(0.25, low=0.0, high=1.0)
    lr: float = 1e-4

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Dims of q and k, dims of v, and neurons."""
        return ("qk_dim", "v_dim", "neuron")

    def floors(self, shape: ViTShape) -> dict[str, int]:
        """Return site -> units that stay at least (of dims: per head), in whole multiples."""
        least = {}
        for site, units in self.sites(shape).items():
            neurons = kind_of(site) == "neuron"
            wanted = math.ceil(self.least_neurons * units) if neurons else self.least_dims
            least[site] = min(units, math.ceil(max(1, wanted) / self.multiple) * self.multiple)
        return least

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Remove slices in order of importance per MAC saved, down to the floors."""
        slices = {site: slice_scores(scores[site]) for site in self.sites(shape)}
        floors = self.floors(shape)
        return rank_globally(shape, slices, lambda s: self.shrink(shape, s), macs, floors)

    def least_macs(self, shape: ViTShape) -> int:
        """Return the effective MACs at the floors."""
        units = self.sites(shape)
        shares = {site: 1.0 - least / units[site] for site, least in self.floors(shape).items()}
        return cost_of(self.shrink(shape, shares)).effective_macs

    def kept(self, shape: ViTShape, scores: Scores, thresholds: Thresholds) -> dict[str, Tensor]:
        """Return site -> bool, [H, K] or [F]: the channels that `cut` would keep."""
        counts = self.sites(self.shrink(shape, thresholds))
        return {
            site: torch.zeros_like(s, dtype=torch.bool).scatter_(-1, highest(s, counts[site]), True)
            for site, s in scores.items()
        }

    def learner(self, vit: ViT, data: LearningData) -> CaitChannelsLearner:
        """Start with nothing masked."""
        return CaitChannelsLearner(self, vit)


class StraightThroughGate(Gate):
    """Multiplies by `value`, then masks with the gradient of what is not masked.

    Attributes:
        gone: Bool, broadcast against the output: the channels that are masked. None masks nothing.
    """

    gone: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return 0 where masked, with slopes `value` in the activation and a in the value.

        Args:
            x: [B, N, D], or [B, H, N, K] of queries.
        """
        out = super().forward(x)
        # x - x is exactly 0, so that what is masked in the run is what surgery removes.
        return out if self.gone is None else out - out.detach() * self.gone


class CaitChannelsLearner(UnitLearner):
    """Weights, importances and masks.

    Attributes:
        sizes: Site -> [H, K], [H, V] or [F], the shape of its scores.
        gates: Site -> the gate that its channels pass.
        importance: [C], the moving average, of the channels of all sites one after the other.
        unmasked: [C] bool, the channels that are not masked.
        seen: Number of batches in `importance`.
        decided: Decisions made.
        returned: Times that a masked channel came back.
    """

    importance: Tensor
    unmasked: Tensor
    seen: Tensor
    decided: Tensor
    returned: Tensor

    def __init__(self, method: CaitChannels, vit: ViT) -> None:
        """Put gates on the channels of the method's kinds."""
        super().__init__(vit, distils=method.distill > 0.0)
        self.method, self.shape = method, vit.shape()
        parameter = next(vit.parameters())
        adam = torch.optim.AdamW(decayed(vit.parameters(), 0.05), lr=method.lr)
        self.optimizers = {"weights": adam}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.gates: dict[str, StraightThroughGate] = {}
        for site, units in method.sites(self.shape).items():
            index, kind = block_of(site), kind_of(site)
            heads = self.shape.blocks[index].heads
            self.sizes[site] = (units,) if kind == "neuron" else (heads, units)
            self.gates[site] = _add_gate(vit.blocks[index], GATED[kind])
        self._lengths = [math.prod(size) for size in self.sizes.values()]
        channels = sum(self._lengths)
        self.register_buffer("importance", parameter.new_zeros(channels))
        self.register_buffer("unmasked", parameter.new_ones(channels, dtype=torch.bool))
        for counter in ("seen", "decided", "returned"):  # on the CPU, so that reading never waits
            self.register_buffer(counter, torch.zeros((), dtype=torch.long))

    @property
    def frozen(self) -> bool:
        """Whether the last decision is made."""
        return int(self.decided) == self.method.decisions

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Decide if it is time, then train the weights and average the importances."""
        method = self.method
        due = min(method.decisions, int(progress / method.ramp * method.decisions))
        if due > int(self.decided):
            self.decide(due)
        xi = self.set_gates(len(images))
        loss = self.loss(images, labels)
        optimizer = self.optimizers["weights"]
        set_lr(optimizer, method.lr * schedule_factor(int(1000 * progress), 1000, 0.05))
        backward(loss, [optimizer])
        if xi.grad is not None:
            self.observe(xi.grad)
        clip_and_step([optimizer], self.vit.parameters())
        return loss

    def conclude(self, data: LearningData) -> Learned:
        """Return the importances that the last decision was made by."""
        if not self.frozen:  # a run of so few steps that none lies behind the ramp
            self.decide(self.method.decisions)
        remove_gates(self.vit)
        return Learned(scores=self.scores(), weights=model_tensors(self.vit), report=self.report())

    def set_gates(self, batch: int) -> Tensor:
        """Hand xi and the masks to the gates; return xi, [B, C], ones that no frozen gate uses."""
        xi = self.importance.new_ones(batch, len(self.importance), requires_grad=not self.frozen)
        factors = self._by_site(self.unmasked.to(xi.dtype).unsqueeze(0) if self.frozen else xi)
        gone = self._by_site(~self.unmasked.unsqueeze(0))
        for site, gate in self.gates.items():
            gate.value = factors[site]  # a factor per image: its gradient is of the image's loss
            gate.gone = None if self.frozen else gone[site]
        return xi

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy + distill * KL(teacher || student), means over the batch."""
        with autocast(self.device, self.autocast):
            logits = self.vit(images).float()
            targets = self.teach(images)
        loss = F.cross_entropy(logits, labels)
        if targets is None:
            return loss
        return loss + self.method.distill * distillation(logits, targets, 1.0)

    @torch.no_grad()
    def observe(self, gradient: Tensor) -> None:
        """Average in the importances of a batch.

        Args:
            gradient: [B, C], of xi: 1 / B of the images' own, whose mean size therefore is a sum.
        """
        self.seen += 1
        weight = max(1.0 - self.method.ema, 1.0 / int(self.seen))
        self.importance.lerp_(gradient.abs().sum(dim=0), weight)

    @torch.no_grad()
    def decide(self, number: int) -> None:
        """Choose anew which channels are masked: decision 1, 2, ..., the last of which is final."""
        method, scores = self.method, self.scores()
        dense = cost_of(self.shape).effective_macs
        removed = removed_share(number / method.decisions, 1.0 - method.budget)
        macs = max((1.0 - removed) * dense, method.least_macs(self.shape))
        unmasked = torch.ones_like(self.unmasked)
        if macs < dense:
            masks = method.kept(self.shape, scores, method.allocate(self.shape, scores, macs))
            unmasked = torch.cat([masks[site].flatten() for site in self.sizes]).to(self.device)
        self.returned += (unmasked & ~self.unmasked).sum().cpu()
        self.unmasked.copy_(unmasked)
        self.decided.fill_(number)

    def scores(self) -> Scores:
        """Return the importances by site, on the CPU: there `allocate` adds up the same bits."""
        flat = self._by_site(self.importance.detach().float().cpu()[None])
        return {site: part.reshape(self.sizes[site]).clone() for site, part in flat.items()}

    def report(self) -> dict[str, float]:
        """Return the share of the multiply-adds that is left, and how often a channel came back."""
        masks = self._by_site(self.unmasked[None].double())
        shares = {site: 1.0 - mask.mean().item() for site, mask in masks.items()}
        left = cost_of(self.method.shrink(self.shape, shares)).effective_macs
        dense = cost_of(self.shape).effective_macs
        return {"remaining_macs": left / dense, "returned": float(self.returned)}

    def _by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Split values [B, C] into [B, H, 1, K], [B, 1, H * V] or [B, 1, F], as gates want them."""
        parts = zip(self.sizes.items(), values.split(self._lengths, dim=1), strict=True)
        return {
            site: (part.unflatten(1, size) if kind_of(site) == "qk_dim" else part).unsqueeze(-2)
            for (site, size), part in parts
        }


def removed_share(time: float, final: float) -> float:
    """Return s(t) = s_T (1 - (1 - t)^3), the share that is removed at 0 <= t <= 1 of the ramp."""
    return final * (1.0 - (1.0 - time) ** 3)


def _add_gate(block: Block, slot: str) -> StraightThroughGate:
    branch, _, leaf = SLOTS[slot].rpartition(".")
    owner = block.get_submodule(branch)
    gate = StraightThroughGate(getattr(owner, leaf))
    setattr(owner, leaf, gate)
    return gate
