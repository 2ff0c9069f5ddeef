"""X-Pruner: explainability-aware masks per class, then thresholds per layer under a budget.

L. Yu and W. Xiang (2023), arXiv:2303.04935. There is no code by the authors, and the equations
below are known through re-implementations that cite them; what is silent is decided here:

- The prunable unit of attention is the head; an MLP mask lies on the neurons, not on the weight
  matrix, which per class would be hundreds of millions of values.
- The weight of the sparsity term (eq. 7) is unknown, and a fixed one says something else to every
  number of units, steps and images. It is solved for in each step: masks shrink until their mean,
  by multiply-adds, lies on a line from 1 to the budget. They shrink in the metric of the loss's
  curvature (a proximal Newton step): what the loss does not feel goes first. The smoothness term
  is measured by the loss's own slopes for the same reason.
- So that thresholds can be compared between layers, a unit's score is its place in the ranking of
  all units: the share of the multiply-adds that ranks lower.
- The weight gamma of the budget's term (eqs. 10-11) is solved for in each step too: it is what
  leaves R as it is. A common part of all thresholds keeps R at what is to be removed, which rises
  along a line, so that the weights follow. Ascending multipliers need hundreds of steps for that.
- The budget counts multiply-adds, not mask elements. No mask falls below 0. The loss of stage 2 has
  the divergence from the dense model beside the cross-entropy (`distill`).
- Rates are lengths per run and divided by its number of steps.
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
    cutoff,
    model_tensors,
    places,
)
from pruners.families.options import option
from pruners.model.class_masks import ClassMasks, falling
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
    distilled_loss,
    schedule_factor,
    set_lr,
)

SLOPE = 10.0
"""Slope n of the tanh step between kept and cut (eq. 9)."""
FALL = (0.1, 0.8)
"""Part of stage 1 in which the masks fall to the budget: first the curvature must be known."""
CUT = (0.0, 0.6)
"""Part of stage 2 in which units go; the weights train on without them."""
LAST = 10.0
"""Place of a site's best unit, which always stays: above all others."""


@dataclass(frozen=True, kw_only=True)
class XPruner(LearnedPruner):
    """Learns a mask value per unit and class, then a threshold per site.

    Stage 1 (`mask_epochs`): the network is frozen and runs with the mask row of each image's label;
    the loss is cross-entropy, with the mean of the masks held to the budget and `smoothness` times
    their summed absolute second differences. Stage 2 (`epochs`): the masks, summed over classes,
    score the units, labels are no longer needed, and thresholds and weights train under the budget
    (eqs. 9-11).

    Attributes:
        budget: Share of the dense cost that the masks fall to and thresholds are learned for.
        thresholds: "learned" as in the paper, or "global": all units of the network ranked by the
            sum of their masks, without stage 2 (the paper's first preprint).
        classes: The classes that the model must know; all if empty.
        mask_epochs: Epochs of stage 1.
        newton: Newton steps per run, of the masks down the cross-entropy.
        smoothness: Pull to even masks, in root mean squares of the loss's slopes at a site.
        smooth_over: What is even: neighbouring "units" of a class, or neighbouring "classes".
        distill: Share of the divergence from the dense model in the loss of stage 2.
        threshold_travel: How far a layer's threshold gets per run, at the peak of a rate that falls
            as a cosine; its unit is all of the multiply-adds.
    """

    budget: float = option(0.5, above=0.0, below=1.0)
    thresholds: Literal["learned", "global"] = "learned"
    classes: tuple[int, ...] = option((), low=0)
    mask_epochs: int = option(2, low=1)
    newton: float = option(1.0, low=0.0)
    smoothness: float = option(1e-2, low=0.0)
    smooth_over: Literal["units", "classes"] = "units"
    distill: float = option(0.5, low=0.0, high=1.0)
    threshold_travel: float = option(0.5, low=0.0)

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
        """Start with masks of ones and one threshold for all sites."""
        return XPrunerLearner(self, vit, data.steps)


class XPrunerLearner(UnitLearner):
    """Both stages.

    Attributes:
        sites: The sites, in the order of `masks` and `thresholds`.
        masks: Per site [C, H * V] or [C, F].
        thresholds: [sites], by how much each site's lies above the common one.
        costs: Site -> share of the dense multiply-adds that goes with all of its units.
        places: Site -> [units], see `places`; empty until stage 2.
        removal: Share of the multiply-adds that is to be gone by now.
    """

    def __init__(self, method: XPruner, vit: ViT, steps: int) -> None:
        """Put gates behind attention and behind the MLP's activation. An epoch has `steps`.

        Raises:
            ValueError: If the option `classes` names a class that does not exist.
        """
        learns = method.thresholds == "learned"
        super().__init__(vit, distils=learns and method.distill > 0.0)
        self.method, self.shape = method, vit.shape()
        self.mask_steps, self.steps = method.mask_epochs * steps, method.epochs * steps
        classes = self.shape.classes
        if wrong := [c for c in method.classes if c >= classes]:
            raise ValueError(
                f"option classes of {method.name} has {wrong[0]}; give classes below {classes}"
            )
        units = method.sites(self.shape)
        self.sites = list(units)
        gates = add_gates(vit, "mixed", "neuron")
        self._gates = [
            gates[block_of(site)]["mixed" if site.endswith("head") else "neuron"]
            for site in self.sites
        ]
        self.masks_per_unit = {site: self._width(site) for site in self.sites}
        widths = list(self.masks_per_unit.values())
        self.masks = ClassMasks(classes, list(units.values()), widths, self.device)
        self.thresholds = nn.Parameter(torch.zeros(len(self.sites), device=self.device))
        self.places: Scores = {}
        self.removal = 0.0
        dense = cost_of(self.shape).effective_macs
        self.costs = {site: self._site_macs(site) / dense for site in self.sites}
        self.optimizers = {
            "weights": torch.optim.AdamW(decayed(vit.parameters(), 0.05), lr=method.lr),
            "thresholds": torch.optim.AdamW([self.thresholds], weight_decay=0.0),
        }

    def begin_epoch(self, epoch: int) -> None:
        """Enter stage 2 behind the mask epochs."""
        first = self.method.mask_epochs
        self.vit.requires_grad_(epoch >= first)
        if epoch < first:
            return
        self.places = places(self.importance(), self.costs)

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train masks in stage 1, weights and thresholds in stage 2."""
        first = self.method.mask_epochs / self.method.total_epochs()
        if self.places:
            return self._train_thresholds(images, labels, (progress - first) / (1.0 - first))
        return self._train_masks(images, labels, progress / first)

    def conclude(self, data: LearningData) -> Learned:
        """Return how far each unit's score lies above its site's threshold."""
        remove_gates(self.vit)
        if self.method.thresholds == "global":
            return Learned(scores=self.importance(), by_class=self.masks_by_class())
        self.removal = 1.0 - self.method.budget
        removed = self.removed_macs(self.gate_values())
        return Learned(
            scores=self.margins(),
            weights=model_tensors(self.vit),
            by_class=self.masks_by_class(),
            report={"budget_reached": 1.0 - removed.item()},
        )

    @torch.no_grad()
    def importance(self) -> Scores:
        """Return site -> |sum over classes of the masks|, per unit; of a head, its dims' mean.

        A sum over a head's dims would be the same to thresholds, but could not be compared with
        neurons in a global ranking.
        """
        wanted = list(self.method.classes) or slice(None)
        return {site: masks[wanted].sum(0).abs() for site, masks in self.masks_by_class().items()}

    @torch.no_grad()
    def masks_by_class(self) -> Scores:
        """Return site -> masks [classes, units], the mean over a head's dims."""
        return {
            site: mask.unflatten(1, (-1, self.masks_per_unit[site])).mean(2)
            for site, mask in zip(self.sites, self.masks.values, strict=True)
        }

    def margins(self) -> Scores:
        """Return site -> how far each unit's place lies above its site's threshold, [units].

        The common part of the thresholds is such that `removal` lies below.
        """
        own = dict(zip(self.sites, self.thresholds, strict=True))
        raised = {site: place - own[site] for site, place in self.places.items()}
        last = {s: r.masked_fill(r == r.max(), LAST) for s, r in raised.items()}
        common = cutoff(last, self.costs, self.removal)
        return {site: place - common for site, place in raised.items()}

    def gate_values(self) -> Scores:
        """Return site -> hard gates [units], whose gradient is that of the tanh step."""
        values = {}
        for site, margin in self.margins().items():
            best = margin == margin.max()  # one unit always stays
            soft = 0.5 * (1.0 + torch.tanh(SLOPE * margin))
            values[site] = hard(soft, (margin > 0.0) | best)
        return values

    def removed_macs(self, gates: Scores) -> Tensor:
        """Return R, the removed share of the dense multiply-adds, []."""
        parts = [self.costs[site] * (1.0 - gate.mean()) for site, gate in gates.items()]
        return torch.stack(parts).sum()

    def hold_budget(self, removed: Tensor) -> None:
        """Take out of the thresholds' gradient what would move R, `removed`, []."""
        (slope,) = torch.autograd.grad(removed, self.thresholds)
        assert self.thresholds.grad is not None
        gamma = self.thresholds.grad @ slope / (slope @ slope).clamp_min(1e-12)
        self.thresholds.grad -= gamma * slope

    def _train_masks(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        self.vit.eval()
        method, values = self.method, list(self.masks.values)
        for gate, mask in zip(self._gates, values, strict=True):
            gate.value = mask[labels].unsqueeze(1)  # [B, 1, units]
        loss = F.cross_entropy(self._logits(images), labels)
        slopes = torch.autograd.grad(loss, values)
        batch, steps = len(labels), self.mask_steps
        self.masks.observe(slopes, batch, steps)
        uneven = self.masks.uneven_slopes(slopes, method.smooth_over)
        smooth = [s + method.smoothness * u for s, u in zip(slopes, uneven, strict=True)]
        self.masks.descend(smooth, method.newton, batch, steps)
        if progress > FALL[0]:
            self.masks.shrink(list(self.costs.values()), falling(progress, *FALL, method.budget))
        return loss

    def _train_thresholds(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        method = self.method
        self.removal = 1.0 - falling(progress, *CUT, method.budget)
        gates = self.gate_values()
        for gate, site in zip(self._gates, self.sites, strict=True):
            gate.value = gates[site].repeat_interleave(self.masks_per_unit[site])
        loss = self._task_loss(images, labels)
        weights, thresholds = self.optimizers["weights"], self.optimizers["thresholds"]
        factor = schedule_factor(int(1000 * progress), 1000, 0.05)
        set_lr(weights, method.lr * factor)
        set_lr(thresholds, method.threshold_travel / self.steps * factor)
        backward(loss, [weights, thresholds])
        self.hold_budget(self.removed_macs(self.gate_values()))
        clip_and_step([weights, thresholds], self.vit.parameters())
        return loss

    def _task_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, and divergence from the dense model if that is wanted."""
        logits, targets = self._logits(images), self.teach(images)
        return distilled_loss(logits, labels, targets, distill=self.method.distill, temperature=1.0)

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.autocast):
            return self.vit(images).float()

    def _site_macs(self, site: str) -> float:
        """Multiply-adds that go with all units of a site."""
        index, zero = block_of(site), torch.zeros(())
        block = self.shape.blocks[index]
        sizes = (zero, zero, zero + block.hidden)
        if site.endswith("head"):
            sizes = (zero + block.heads * block.qk_dim, zero + block.heads * block.v_dim, zero)
        return linear_macs(self.shape, index, *sizes).item()

    def _width(self, site: str) -> int:
        """Mask values that one unit of a site has: a head has one per v dim."""
        return self.shape.blocks[block_of(site)].v_dim if site.endswith("head") else 1
