"""UVC: heads, their dims, neurons and whole blocks under one budget, by a primal-dual method.

S. Yu et al. (2022), Unified Visual Transformer Compression, arXiv:2203.08243:

    min over W, s, r, gt; max over y, p, z >= 0 of
    loss(W, gt) + sum y A(s) + sum p A(r) + z (R(s, r, gt) - B)

A is the squared norm of the groups that are to go, R the remaining share of the multiply-adds, B
the budget. The paper trains for 30 epochs of ImageNet; so that runs of 60 to 1000 steps work too:

- s and r are fractions of their groups, A is scaled by its layer's norm, and the steps of s, r, gt
  and of the multipliers are lengths per run: they are divided by the number of steps. The gradient
  of each fraction is divided by the cost that goes with it, so that heads and neurons move alike.
- z (R - B) has the damping term c / 2 (R - B)^2 beside it, without which R swings. It also brings R
  up to B again: groups that were shrunk already have no norm left that would call them back.
- Blocks skip only after width has begun to move. Blocks and heads, large steps in R, then stay, and
  dims and neurons close the gap: R, which is that of hard gates and whole groups, ends at B.
  Skipping alone never undershoots it.
- Gates step with momentum and clipped gradients instead of collecting 50 batches; before they
  move, blocks run whole. The weights' optimiser leaves them alone.
- R counts what surgery leaves: v's rows of a removed dim too, and the padding of ragged heads, but
  not the rounding by `multiple`.
- Cross-entropy is that of the labels as they come; mixing images is the data's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.families.learned import Learned, LearnedPruner, UnitLearner, model_tensors
from pruners.families.options import option
from pruners.model.cost import cost_of
from pruners.model.gates import add_gates, hard, remove_gates
from pruners.model.relaxed import CompressedBlock
from pruners.model.shape import ViTShape
from pruners.model.sites import block_site, ragged_site
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

GUMBEL_TEMPERATURE = 0.5
GATE_CLIP = 0.1
"""Largest gradient of a gate: a sample without the first block alone would decide the run."""


@dataclass(frozen=True, kw_only=True)
class UVC(LearnedPruner):
    """Learns how many heads, dims and neurons go from each layer, and which blocks are skipped.

    Which ones go is decided by the norms of the columns of `proj` and `fc2`, anew in each step.
    In the last part of the run the choice stands and the weights train under its masks.

    Attributes:
        budget: Share of the dense multiply-adds that is learned for.
        distill: Share of the divergence from the dense model in the loss. The paper's 0.1 is next
            to nothing in its code, which divides the divergence by batch and classes.
        temperature: Temperature of the divergence.
        masked: Share of the run, at its end, under hard masks (the paper's post-training).
        gates_from: Part of the run after which blocks may be skipped.
        coarse_until: Part of the run after which blocks and heads stay as they are.
        width_lr: Step of s and r, per run: how far a fraction moves at gradient 1.
        gate_lr: Step of the gates, per run, with momentum 0.9.
        dual_lr: Step of y and p, per run.
        price_lr: Step of z, per run; five equal parts of the search take 1, 5, 9, 13, 17 times it.
        damping: Weight c of the squared gap to the budget.
        gate_price: What z weighs in the gates' gradient, beside the loss (the paper's 5e-4).
        prox_lr: Proximal step, per run: what goes is divided by 1 + 2 * step * multiplier.
    """

    whole_kinds = ("ragged_v_dim",)

    units: tuple[str, ...] = ("ragged_v_dim", "neuron", "block")
    budget: float = option(0.5, above=0.0, below=1.0)
    distill: float = option(0.5, low=0.0, high=1.0)
    temperature: float = option(1.0, low=0.1)
    masked: float = option(0.5, low=0.0, high=1.0)
    gates_from: float = option(0.15, low=0.0)
    coarse_until: float = option(0.3, low=0.0)
    width_lr: float = option(4.0, low=0.0)
    gate_lr: float = option(60.0, low=0.0)
    dual_lr: float = option(4.0, low=0.0)
    price_lr: float = option(16.0, low=0.0)
    damping: float = option(4.0, low=0.0)
    gate_price: float = option(2.0, low=0.0)
    prox_lr: float = option(20.0, low=0.0)

    def __post_init__(self) -> None:
        """Check also that the phases of the run follow on each other."""
        super().__post_init__()
        if not self.gates_from <= self.coarse_until <= 1.0 - self.masked:
            raise ValueError(
                f"option coarse_until of {self.name} is {self.coarse_until}; give "
                f"gates_from = {self.gates_from:g} to 1 - masked = {1.0 - self.masked:g}"
            )

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Head dims whose number differs by head, neurons, and whole blocks."""
        return ("ragged_v_dim", "neuron", "block")

    def learner(self, vit: ViT, data: LearningData) -> UVCLearner:
        """Start with everything kept."""
        return UVCLearner(self, vit, self.epochs * data.steps)

    def savings(self, shape: ViTShape, margins: Scores) -> dict[str, float]:
        """Return what is left of the dense costs without what lies below 0, and where it went."""
        shares = {site: (margin < 0.0).double().mean().item() for site, margin in margins.items()}
        skips = {s: share for s, share in shares.items() if s.endswith("block") and share == 1.0}
        dense, cut = cost_of(shape), cost_of(self.shrink(shape, shares))
        unskipped = cost_of(self.shrink(shape, skips)).effective_macs / dense.effective_macs
        remaining = cut.effective_macs / dense.effective_macs
        return {
            "remaining_macs": remaining,
            "remaining_params": cut.nonzeros / dense.nonzeros,
            "saved_by_blocks": 1.0 - unskipped,
            "saved_by_width": unskipped - remaining,
            "blocks_skipped": float(len(skips)),
        }


class UVCLearner(UnitLearner):
    """The primal-dual run.

    Attributes:
        blocks: The blocks, each in its wrapper.
        gates: [L, 2], gt; a block runs while its second logit is not the smaller one.
        price: z, the multiplier of the budget.
    """

    price: Tensor

    def __init__(self, method: UVC, vit: ViT, steps: int) -> None:
        """Wrap the blocks. `steps` is the length of the run."""
        super().__init__(vit, distils=method.distill > 0.0)
        self.method, self.shape, self.steps = method, vit.shape(), max(1, steps)
        self._slots, weights = add_gates(vit, "mixed", "neuron"), list(vit.parameters())
        self.blocks = [CompressedBlock(block) for block in vit.blocks]
        vit.vit.blocks = nn.Sequential(*self.blocks)
        self.gates = nn.Parameter(torch.tensor([[-1.0, 1.0]] * len(self.blocks)).to(self.device))
        self.register_buffer("price", torch.tensor(1e-3, device=self.device))
        kinds = {"heads": "ragged_v_dim", "dims": "ragged_v_dim", "neurons": "neuron"}
        self._groups = [
            (block, name, group)
            for block in self.blocks
            for name, group in block.groups.items()
            if kinds[name] in method.units
        ]
        self._fractions = [group.fraction for _, _, group in self._groups]
        self._dense = cost_of(self.shape).effective_macs
        self._shares = self._block_macs().detach() / self._dense  # [L]
        costs = torch.autograd.grad(-self.remaining(), self._fractions) if self._groups else ()
        self._costs = [cost * len(self.blocks) for cost in costs]  # of one block's
        widths = self._fractions or [nn.Parameter(torch.zeros(0))]
        self.optimizers = {
            "weights": torch.optim.AdamW(decayed(weights, 0.05), lr=method.lr),
            "widths": torch.optim.SGD(widths, lr=method.width_lr / self.steps),
            "gates": torch.optim.SGD(
                [self.gates], lr=method.gate_lr / self.steps, momentum=0.9, weight_decay=1e-4
            ),
        }

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train the weights, and as long as the search lasts all else."""
        search = 1.0 - self.method.masked
        gating = self._gating(progress)
        self.prepare(gating=gating, masked=progress >= search)
        loss = self.loss(images, labels)
        factor = schedule_factor(int(1000 * progress), 1000, 0.05)
        weights = self.optimizers["weights"]
        set_lr(weights, self.method.lr * factor)
        backward(loss, self.optimizers.values())
        clip_and_step([weights], self.vit.parameters())
        if progress < search:
            for block in self.blocks:
                block.shrink(self.method.prox_lr * factor / self.steps)
            self.move(progress, gating)
            self.ascend(self.method.price_lr * (1 + 4 * int(5 * progress / search)))
        return loss

    def conclude(self, data: LearningData) -> Learned:
        """Return by how far each unit's rank lies above what goes, and where savings come from."""
        margins = self.margins()
        self.unwrap()
        report = self.method.savings(self.shape, margins)
        return Learned(scores=margins, weights=model_tensors(self.vit), report=report)

    def prepare(self, *, gating: bool, masked: bool) -> None:
        """Set gates and masks for a forward pass."""
        opened = self.opened().bool().tolist()
        mix = F.gumbel_softmax(self.gates, GUMBEL_TEMPERATURE)[:, 1] if gating else None
        for i, block in enumerate(self.blocks):
            block.gate = None if mix is None else mix[i]
            block.skipped = mix is None and not opened[i]
            for slot, mask in block.masks().items():
                self._slots[i][slot].value = mask.detach().flatten() if masked else None

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return (1 - distill) * cross-entropy + distill * T^2 * KL(teacher || student)."""
        method = self.method
        with autocast(self.device, self.autocast):
            logits = self.vit.vit(images).float()
            targets = self.teach(images)
        return distilled_loss(
            logits, labels, targets, distill=method.distill, temperature=method.temperature
        )

    def opened(self) -> Tensor:
        """Return 0 or 1 for each block, [L]; the slope is that of softmax(gt)."""
        kept = self.gates[:, 1] >= self.gates[:, 0]
        return hard(self.gates.softmax(dim=1)[:, 1], kept)

    def remaining(self) -> Tensor:
        """Return R, with hard gates and whole groups."""
        return 1.0 + ((self.opened() * self._block_macs()).sum() / self._dense - self._shares.sum())

    def gap(self, remaining: Tensor) -> Tensor:
        """Return R - B, at most 0.5 either way."""
        return (remaining.detach() - self.method.budget).clamp(-0.5, 0.5)

    def move(self, progress: float, gating: bool) -> None:
        """Descend fractions and gates on y A + p A + z (R - B), and project them."""
        remaining = self.remaining()
        pull = self.price + self.method.damping * self.gap(remaining)
        penalty = sum((g.dual * b.removed_norms()[n]).sum() for b, n, g in self._groups)
        objective = penalty + pull * len(self.blocks) * remaining
        *widths, gates = torch.autograd.grad(objective, [*self._fractions, self.gates])
        settling = progress >= self.method.coarse_until
        for (_, name, group), gradient, cost in zip(self._groups, widths, self._costs, strict=True):
            stays = settling and name == "heads"
            group.fraction.grad = None if stays else gradient / cost
        nn.utils.clip_grad_norm_(self._fractions, 1.0, norm_type=torch.inf)
        self.optimizers["widths"].step()
        if gating and self.gates.grad is not None:
            self.gates.grad += self.method.gate_price * gates
            self.gates.grad.clamp_(-GATE_CLIP, GATE_CLIP)
            self.optimizers["gates"].step()
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Keep a group of each set, and the blocks without which skipping undershoots B."""
        for _, _, group in self._groups:
            group.fraction.clamp_(0.0, (group.units - 1) / group.units)
        lead = self.gates[:, 1] - self.gates[:, 0]
        order = lead.argsort()
        left = 1.0 - self._shares[order].cumsum(dim=0)
        back = order[(left < self.method.budget) & (lead[order] < 0.0)]
        self.gates[back] = self.gates[back].mean(dim=1, keepdim=True)

    @torch.no_grad()
    def ascend(self, price_lr: float) -> None:
        """Raise the multipliers of what is violated; all stay >= 0."""
        for block, name, group in self._groups:
            norm = block.removed_norms()[name]
            group.dual.add_(self.method.dual_lr / self.steps * norm).clamp_(min=0.0)
        self.price.add_(price_lr / self.steps * self.gap(self.remaining())).clamp_(min=0.0)

    def margins(self) -> Scores:
        """Return the margins of all units of the wanted sites."""
        found: Scores = {}
        for i, block in enumerate(self.blocks):
            if "heads" in block.groups:
                dims, heads = block.groups["dims"], block.groups["heads"]
                whole = heads.places().unsqueeze(1) / heads.units
                margins = torch.where(whole < 0.0, whole - 1.0, dims.places() / dims.units)
                found |= {ragged_site(i, h, "ragged_v_dim"): m for h, m in enumerate(margins)}
            if "neurons" in block.groups:
                neurons = block.groups["neurons"]
                found[f"blocks.{i}.mlp.neuron"] = neurons.places() / neurons.units
            found[block_site(i)] = self.gates[i].detach().softmax(dim=0)[1:] - 0.5
        return {site: found[site] for site in self.method.sites(self.shape)}

    def unwrap(self) -> None:
        """Put the blocks back."""
        remove_gates(self.vit)
        self.vit.vit.blocks = nn.Sequential(*(block.block for block in self.blocks))

    def _gating(self, progress: float) -> bool:
        method = self.method
        return "block" in method.units and method.gates_from <= progress < method.coarse_until

    def _block_macs(self) -> Tensor:
        """Multiply-adds of each block as it stands, [L]."""
        macs = [block.macs(self.shape, i) for i, block in enumerate(self.blocks)]
        return torch.stack([m.to(self.device) for m in macs])
