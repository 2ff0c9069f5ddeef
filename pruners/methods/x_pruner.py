"""X-Pruner: explainability-aware masks per class, then thresholds per layer under a budget.

L. Yu and W. Xiang (2023), arXiv:2303.04935. There is no code by the authors, and the equations
below are known through re-implementations that cite them; what is silent is decided here:

- The prunable unit of attention is the head; an MLP mask lies on the neurons, not on the weight
  matrix, which per class would be hundreds of millions of values.
- Scores are standardised in each site, so that thresholds can be compared between layers.
- The budget counts multiply-adds, not mask elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.families.learned import (
    Learned,
    LearnedPruner,
    UnitLearner,
    model_tensors,
    standardised,
)
from pruners.families.options import option
from pruners.model.class_masks import mean_square, unevenness
from pruners.model.cost import cost_of
from pruners.model.gates import add_gates, hard, linear_macs, remove_gates
from pruners.model.sites import block_of
from pruners.model.types import Scores
from pruners.model.vit import ViT
from pruners.training.learner import LearningData
from pruners.training.optimisation import (
    autocast,
    backward,
    clip_and_step,
    decayed,
    schedule_factor,
    set_lr,
)

SLOPE = 10.0
"""Slope n of the tanh step between kept and cut (eq. 9)."""


@dataclass(frozen=True, kw_only=True)
class XPruner(LearnedPruner):
    """Learns a mask value per unit and class, then a threshold per site.

    Stage 1 (`mask_epochs`): the network is frozen and runs with the mask row of each image's label;
    the loss is cross-entropy + `sparsity` * mean square of the masks + `smoothness` * mean absolute
    second difference of the masks. Stage 2 (`epochs`): the masks, summed over classes, score the
    units, labels are no longer needed, and thresholds and weights train with the multipliers of
    the budget ascended (eqs. 9-11).

    Attributes:
        budget: Share of the dense cost that thresholds are learned for.
        thresholds: "learned" as in the paper, or "global": all units of the network ranked by the
            sum of their masks, without stage 2 (the paper's first preprint).
        classes: The classes that the model must know; all if empty.
        mask_epochs: Epochs of stage 1.
        mask_lr: Learning rate of the masks.
        threshold_lr: Learning rate of the thresholds.
        multiplier_lr: Steps of the ascent of beta and gamma. Gamma sums up the gap to the budget
            and would overshoot with a large step; beta damps.
        sparsity: Weight of the masks' size.
        smoothness: Weight of the masks' unevenness.
        smooth_over: What is even: neighbouring "units" of a class, or neighbouring "classes".
    """

    budget: float = option(0.5, above=0.0, below=1.0)
    thresholds: Literal["learned", "global"] = "learned"
    classes: tuple[int, ...] = option((), low=0)
    mask_epochs: int = option(2, low=1)
    mask_lr: float = option(1e-2, low=0.0)
    threshold_lr: float = option(2e-2, low=0.0)
    multiplier_lr: tuple[float, float] = option((10.0, 0.1), low=0.0)
    sparsity: float = option(1e-2, low=0.0)
    smoothness: float = option(1e-3, low=0.0)
    smooth_over: Literal["units", "classes"] = "units"

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Heads and neurons."""
        return ("head", "neuron")

    def learns_for_a_budget(self) -> bool:
        """Not with a global ranking: one run serves all budgets."""
        return self.thresholds == "learned"

    def total_epochs(self) -> int:
        """Epochs of both stages."""
        return self.mask_epochs + (self.epochs if self.thresholds == "learned" else 0)

    def learner(self, vit: ViT, data: LearningData) -> XPrunerLearner:
        """Start with masks of ones and thresholds below every score."""
        return XPrunerLearner(self, vit)


class XPrunerLearner(UnitLearner):
    """Both stages.

    Attributes:
        sites: The sites, in the order of `masks` and `thresholds`.
        masks: Per site [C, H * V] or [C, F].
        thresholds: [sites], in standard deviations of the site's scores.
        multipliers: [2], beta and gamma of eq. 11.
        standard: Site -> standardised scores of its units; from the start of stage 2.
    """

    multipliers: Tensor

    def __init__(self, method: XPruner, vit: ViT) -> None:
        """Put gates behind attention and behind the MLP's activation.

        Raises:
            ValueError: If the option `classes` names a class that does not exist.
        """
        super().__init__(vit)
        self.method, self.shape = method, vit.shape()
        classes = self.shape.classes
        if wrong := [c for c in method.classes if not 0 <= c < classes]:
            raise ValueError(
                f"option classes of {method.name} has {wrong[0]}; give classes below {classes}"
            )
        self.sites = list(method.sites(self.shape))
        gates = add_gates(vit, "mixed", "neuron")
        self._gates = [
            gates[block_of(site)]["mixed" if site.endswith("head") else "neuron"]
            for site in self.sites
        ]
        self.masks_per_unit = {site: self._width(site) for site in self.sites}
        units = method.sites(self.shape)
        self.masks = nn.ParameterList(
            torch.ones(classes, units[site] * self.masks_per_unit[site], device=self.device)
            for site in self.sites
        )
        self.thresholds = nn.Parameter(torch.zeros(len(self.sites), device=self.device))
        self.register_buffer("multipliers", torch.zeros(2, device=self.device))
        self.standard: Scores = {}
        dense = cost_of(self.shape).effective_macs
        self._macs = torch.stack([self._site_macs(site) for site in self.sites]) / dense
        self.optimizers = {
            "masks": torch.optim.AdamW(self.masks, lr=method.mask_lr, weight_decay=0.0),
            "weights": torch.optim.AdamW(decayed(vit.parameters(), 0.05), lr=method.lr),
            "thresholds": torch.optim.AdamW(
                [self.thresholds], lr=method.threshold_lr, weight_decay=0.0
            ),
        }

    def begin_epoch(self, epoch: int) -> None:
        """Enter stage 2 behind the mask epochs."""
        first = self.method.mask_epochs
        self.vit.requires_grad_(epoch >= first)
        if epoch < first:
            return
        importance = self.importance()
        self.standard = {site: standardised(scores) for site, scores in importance.items()}
        if epoch == first:
            lowest = torch.stack([self.standard[site].min() for site in self.sites])
            with torch.no_grad():  # nothing is cut, but the step's slope already reaches the units
                self.thresholds.copy_(lowest - 1.0 / SLOPE)

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train masks in stage 1, weights and thresholds in stage 2."""
        if self.standard:
            return self._train_thresholds(images, labels, progress)
        return self._train_masks(images, labels)

    def conclude(self, data: LearningData) -> Learned:
        """Return how far each unit's score lies above its site's threshold."""
        remove_gates(self.vit)
        if self.method.thresholds == "global":
            ranked = ranked_together(self.importance(), self.masks_per_unit)
            return Learned(scores=ranked, by_class=self.masks_by_class())
        margins = {
            site: self.standard[site] - self.thresholds[i] for i, site in enumerate(self.sites)
        }
        removed = self.removed_macs(self.gate_values())
        return Learned(
            scores=margins,
            weights=model_tensors(self.vit),
            by_class=self.masks_by_class(),
            report={"budget_reached": 1.0 - removed.item()},
        )

    def importance(self) -> Scores:
        """Return site -> |sum over classes (and a head's dims) of the masks|, per unit."""
        wanted = list(self.method.classes) or slice(None)
        with torch.no_grad():
            return {
                site: mask[wanted].sum(0).view(-1, self.masks_per_unit[site]).sum(1).abs()
                for site, mask in zip(self.sites, self.masks, strict=True)
            }

    def masks_by_class(self) -> Scores:
        """Return site -> masks [classes, units], the mean over a head's dims."""
        with torch.no_grad():
            return {
                site: mask.unflatten(1, (-1, self.masks_per_unit[site])).mean(2)
                for site, mask in zip(self.sites, self.masks, strict=True)
            }

    def gate_values(self) -> Scores:
        """Return site -> hard gates [units], whose gradient is that of the tanh step."""
        values = {}
        for i, site in enumerate(self.sites):
            over = self.standard[site] - self.thresholds[i]
            best = self.standard[site] == self.standard[site].max()  # one unit always stays
            soft = 0.5 * (1.0 + torch.tanh(SLOPE * over))
            values[site] = hard(soft, (over > 0.0) | best)
        return values

    def removed_macs(self, gates: Scores) -> Tensor:
        """Return R, the removed share of the dense multiply-adds."""
        rates = torch.stack([1.0 - gates[site].mean() for site in self.sites])
        return (rates * self._macs).sum()

    def budget_loss(self, removed: Tensor) -> Tensor:
        """Return beta (alpha - R)^2 + gamma (alpha - R), alpha the share to remove (eq. 11)."""
        gap = (1.0 - self.method.budget) - removed
        return self.multipliers[0] * gap.square() + self.multipliers[1] * gap

    @torch.no_grad()
    def ascend(self, removed: Tensor) -> None:
        """Move the multipliers up the budget's loss; beta stays >= 0."""
        gap = (1.0 - self.method.budget) - removed
        beta, gamma = self.method.multiplier_lr
        self.multipliers += torch.stack([beta * gap.square(), gamma * gap])
        self.multipliers[0].clamp_(min=0.0)

    def _train_masks(self, images: Tensor, labels: Tensor) -> Tensor:
        self.vit.eval()
        for gate, mask in zip(self._gates, self.masks, strict=True):
            gate.value = mask[labels].unsqueeze(1)  # [B, 1, units]
        loss = self._cross_entropy(images, labels) + self._penalty()
        backward(loss, [self.optimizers["masks"]])
        clip_and_step([self.optimizers["masks"]], self.masks)
        return loss

    def _train_thresholds(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        gates = self.gate_values()
        for gate, site in zip(self._gates, self.sites, strict=True):
            gate.value = gates[site].repeat_interleave(self.masks_per_unit[site])
        removed = self.removed_macs(gates)
        loss = self._cross_entropy(images, labels) + self.budget_loss(removed)
        weights, thresholds = self.optimizers["weights"], self.optimizers["thresholds"]
        first = self.method.mask_epochs / self.method.total_epochs()
        factor = schedule_factor(int(1000 * (progress - first) / (1.0 - first)), 1000, 0.05)
        set_lr(weights, self.method.lr * factor)
        set_lr(thresholds, self.method.threshold_lr * factor)
        backward(loss, [weights, thresholds])
        clip_and_step([weights, thresholds], self.vit.parameters())
        self.ascend(removed)
        return loss

    def _cross_entropy(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.autocast):
            logits = self.vit(images).float()
        return F.cross_entropy(logits, labels)

    def _penalty(self) -> Tensor:
        masks, method = list(self.masks), self.method
        runs = [
            self.masks_per_unit[site] if site.endswith("head") else mask.shape[1]
            for site, mask in zip(self.sites, masks, strict=True)
        ]
        uneven = unevenness(masks, runs, method.smooth_over)
        return method.sparsity * mean_square(masks) + method.smoothness * uneven

    def _site_macs(self, site: str) -> Tensor:
        """Multiply-adds that go with all units of a site."""
        index = block_of(site)
        block, zero = self.shape.blocks[index], torch.zeros((), device=self.device)
        if site.endswith("head"):
            sizes = (zero + block.heads * block.qk_dim, zero + block.heads * block.v_dim, zero)
        else:
            sizes = (zero, zero, zero + block.hidden)
        return linear_macs(self.shape, index, *sizes)

    def _width(self, site: str) -> int:
        """Mask values that one unit of a site has: a head has one per v dim."""
        return self.shape.blocks[block_of(site)].v_dim if site.endswith("head") else 1


def ranked_together(importance: Scores, masks_per_unit: dict[str, int]) -> Scores:
    """Return scores that can be compared over the whole network: a unit's mean mask.

    A head sums a value per dim, a neuron one; without the mean, heads would never go.
    """
    return {site: scores / masks_per_unit[site] for site, scores in importance.items()}
