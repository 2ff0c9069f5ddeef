"""WDPruning: width by learned thresholds under a budget of weights, depth by plug-in classifiers.

F. Yu, K. Huang, M. Wang, Y. Cheng, W. Chu and L. Cui (2022), "Width & Depth Pruning for Vision
Transformers", AAAI. Decided here, where paper and code differ or count on a hundred epochs:

- sigmoid(beta) is the share that is *kept*, as in the code; the paper says pruned.
- Scores train without weight decay; in the code they fall into the weights' group by a misspelt
  name. Nothing is rounded to multiples of 16 while learning.
- The multipliers ascend by plain gradient steps, to about the size that the code's steps of 10 give
  them. The thresholds' gradient is clipped to norm 1, and their AdamW has a short memory and no
  momentum: else the budget's gradients, ten thousand times the task's, would mute the task's once
  the budget is met. A threshold step that crosses the budget ends there; steps of a short run are
  large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.families.learned import Learned, LearnedPruner, UnitLearner, model_tensors
from pruners.families.options import option
from pruners.model.exits import Exit
from pruners.model.gates import add_gates, remaining_weights, remove_gates
from pruners.model.rank_masks import kept_fraction, rank_mask, ranks
from pruners.model.shape import ViTShape
from pruners.model.sites import block_of, kind_of
from pruners.model.tokens import Tokens
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT
from pruners.training.learner import LearningData
from pruners.training.optimisation import (
    autocast,
    backward,
    clip_and_step,
    decayed,
    schedule_factor,
)

GATES = {
    "head": ("query", "key", "mixed"),
    "attn_out": ("attn_out",),
    "neuron": ("pre_neuron",),
    "mlp_out": ("mlp_out",),
}
"""Kind of unit -> slots where its mask acts on the rows, bias included, of a linear layer.

`mixed` is linear in v, so that masking it masks v.
"""
START = 10.0
"""First value of the thresholds: keeps every unit of a site of up to 22,000."""
SCORE_LR = 0.025
"""The paper's. Only the ranks of scores count and all start at 0, so its size changes nothing."""


@dataclass(frozen=True, kw_only=True)
class WDPruning(LearnedPruner):
    """Learns a score per unit and a threshold per site, and classifiers for shallower networks.

    The loss is CE(model) + sum of CE(exits) + lam1 * gap + lam2 * gap^2, where gap is what E, the
    share of the blocks' weights that is left, lies above `budget`; lam1 and lam2 are ascended.

    Two rates are per run and divided by its number of steps, so that runs of 60 and of 1000 steps
    get equally far.

    Attributes:
        exits: Number of blocks in front of each plug-in classifier; if empty, there are two, in
            front of the last block and of the one before. Without the unit "block" there are none.
        max_drop: Points of validation top-1 that the shallowest acceptable exit may lie below the
            whole model.
        exit_lr: Learning rate of the exits, which start untrained.
        threshold_lr: How far a threshold gets in a run, at the peak of a rate that falls as a
            cosine. From 10, where nothing is cut, to -3, where little is left, it is 13: about a
            quarter of the run.
        multiplier_lr: Growth of lam1 and lam2 in a run whose gap stays 1.
        compensate: As of every unit method, but off: weights that trained under these very cuts
            are better as they are, and an exit that becomes the end knows no other stream.
    """

    units: tuple[str, ...] = ("head", "neuron", "attn_out", "mlp_out", "block")
    lr: float = 2e-4
    budget: float = option(0.5, above=0.0, below=1.0)
    exits: tuple[int, ...] = option((), low=1)
    max_drop: float = option(1.0, low=0.0)
    exit_lr: float = option(2e-3, low=0.0)
    threshold_lr: float = option(50.0, low=0.0)
    multiplier_lr: float = option(1e7, low=0.0)
    compensate: bool = False

    def __post_init__(self) -> None:
        """Check also that the kinds of units and the exits fit together."""
        super().__post_init__()
        if self.units == ("block",):
            raise ValueError(f"option units of {self.name} is ['block']; give a kind of width too")
        if self.exits and "block" not in self.units:
            raise ValueError(
                f"option exits of {self.name} is {list(self.exits)}, but units lacks 'block'; "
                "give both or neither"
            )

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Heads, neurons, written channels and blocks."""
        return (*GATES, "block")

    def learner(self, vit: ViT, data: LearningData) -> WDPruningLearner:
        """Start with all units kept and untrained exits."""
        return WDPruningLearner(self, vit, data.steps * self.total_epochs())

    def take_over(self, vit: ViT, learned: Learned, thresholds: Thresholds) -> None:
        """Give a model the learned weights; an exit that becomes the end classifies."""
        blocks = self.shrink(vit.shape(), thresholds).blocks
        filled = [i + 1 for i, block in enumerate(blocks) if block.heads + block.hidden]
        end = f"exits.{max(filled, default=0)}."
        own = {n: t for n, t in learned.weights.items() if not n.startswith("exits.")}
        exits = {n: t for n, t in learned.weights.items() if n.startswith(end)}
        tensors = own | {n.removeprefix(end): t for n, t in exits.items()}
        super().take_over(vit, Learned(scores=learned.scores, weights=tensors), thresholds)


class WDPruningLearner(UnitLearner):
    """Width and depth in one run.

    Attributes:
        sites: Site -> its number of units n, of all kinds but blocks.
        scores: [sum of n], site by site.
        ties: [sum of n], a permutation of each site's units.
        thresholds: [sites], beta.
        multipliers: [2], lam1 and lam2.
        exits: Number of blocks in front -> norm and classifier.
    """

    ties: Tensor
    multipliers: Tensor

    def __init__(self, method: WDPruning, vit: ViT, steps: int) -> None:
        """Put gates on the rows of all four linear layers, and exits behind blocks."""
        super().__init__(vit)
        self.method, self.shape, self.steps = method, vit.shape(), steps
        sites = method.sites(self.shape).items()
        self.sites = {site: units for site, units in sites if kind_of(site) != "block"}
        self.slots = add_gates(vit, *(slot for slots in GATES.values() for slot in slots))
        self.scores = nn.Parameter(torch.zeros(sum(self.sites.values())))
        self.thresholds = nn.Parameter(torch.full((len(self.sites),), START))
        ties = torch.cat([torch.randperm(units) for units in self.sites.values()])
        self.register_buffer("ties", ties)
        self.register_buffer("multipliers", torch.zeros(2))
        self.exits = nn.ModuleDict({str(n): Exit(vit.vit) for n in _exits(method, self.shape)})
        self.to(self.device)
        weights = [
            *decayed(vit.parameters(), 0.05, peak=method.lr),
            *decayed(self.exits.parameters(), 0.05, peak=method.exit_lr),
        ]
        gates = [
            {"params": [self.scores], "peak": SCORE_LR},
            {"params": [self.thresholds], "peak": method.threshold_lr / steps, "betas": (0.0, 0.9)},
        ]
        adam = torch.optim.AdamW
        self.optimizers = {"weights": adam(weights), "gates": adam(gates, weight_decay=0.0)}

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train weights, exits, scores and thresholds; ascend the multipliers."""
        for group in (g for o in self.optimizers.values() for g in o.param_groups):
            group["lr"] = group["peak"] * schedule_factor(int(1000 * progress), 1000, 0.05)
        self.mask()
        remaining = self.remaining()
        loss = self.task_loss(images, labels) + self.budget_loss(remaining)
        backward(loss, self.optimizers.values())
        before = self.thresholds.detach().clone()
        networks = [module.parameters() for module in (self.vit, *self.exits.values())]
        clip_and_step(self.optimizers.values(), *networks, [self.thresholds])
        if remaining > self.method.budget:
            self.shorten(before)
        self.ascend(remaining)
        return loss

    def conclude(self, data: LearningData) -> Learned:
        """Choose the depth on the validation images; return margins and all weights."""
        method, top1 = self.method, self.top1(data.val())
        depth = max(top1)
        kept = min(count for count in top1 if top1[count] >= top1[depth] - method.max_drop)
        report = {
            "remaining_params": self.remaining().item(),
            "kept_blocks": float(kept),
            "val_top1": top1.pop(depth),
        } | {f"val_top1_exit_{count}": value for count, value in top1.items()}
        remove_gates(self.vit)
        exits = {f"exits.{name}": t.cpu().clone() for name, t in self.exits.state_dict().items()}
        margins = self.margins() | {
            site: torch.tensor([(kept - block_of(site) - 0.5) / depth])
            for site in method.sites(self.shape)
            if kind_of(site) == "block"
        }
        return Learned(scores=margins, weights=model_tensors(self.vit) | exits, report=report)

    @torch.no_grad()
    def shorten(self, before: Tensor) -> None:
        """End the thresholds' step [sites] from above the budget where it meets it, if it does."""
        above, below = before, self.thresholds.clone()
        if self.remaining() > self.method.budget:
            return
        for _ in range(8):
            self.thresholds.copy_((above + below) / 2)
            if self.remaining() > self.method.budget:
                above = self.thresholds.clone()
            else:
                below = self.thresholds.clone()
        self.thresholds.copy_(below)

    def by_site(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield (site, scores [n], threshold [], ties [n])."""
        counts = list(self.sites.values())
        parts = (self.scores.split(counts), self.thresholds, self.ties.split(counts))
        return zip(self.sites, *parts, strict=True)

    def mask(self) -> None:
        """Set the gates to the masks of the present scores and thresholds."""
        for site, scores, threshold, ties in self.by_site():
            mask, index = rank_mask(scores, threshold, ties), block_of(site)
            for slot in GATES[kind_of(site)]:
                value = mask
                if slot in ("query", "key"):
                    value = mask.view(-1, 1, 1)  # [H, 1, 1]
                elif slot == "mixed":
                    value = mask.repeat_interleave(self.shape.blocks[index].v_dim)  # [H * V]
                self.slots[index][slot].value = value

    def remaining(self) -> Tensor:
        """Return E, the share of the blocks' weights that is left; differentiable."""
        left = {site: kept_fraction(beta, len(s)) for site, s, beta, _ in self.by_site()}
        return remaining_weights(self.shape, left)

    def budget_loss(self, remaining: Tensor) -> Tensor:
        """Return lam1 * gap + lam2 * gap^2 with gap = max(E - budget, 0)."""
        gap = (remaining - self.method.budget).relu()
        return self.multipliers @ torch.stack([gap, gap.square()])

    @torch.no_grad()
    def ascend(self, remaining: Tensor) -> None:
        """Move the multipliers up the budget's loss; they never fall."""
        gap = (remaining - self.method.budget).relu()
        rate = self.method.multiplier_lr / self.steps
        self.multipliers += rate * torch.stack([gap, gap.square()])

    def task_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of the model and of all exits."""
        with autocast(self.device, self.autocast):
            logits = self.logits(images)
        return torch.stack([F.cross_entropy(x.float(), labels) for x in logits.values()]).sum()

    def logits(self, images: Tensor) -> dict[int, Tensor]:
        """Return number of blocks -> logits [B, classes] of its exit, or of the model itself."""
        vit, found = self.vit.vit, {}
        tokens = Tokens(self.vit.embed(images))
        for count, block in enumerate(self.vit.blocks, start=1):
            tokens = block(tokens)
            if str(count) in self.exits:
                found[count] = self.exits[str(count)](tokens.x, vit)
        return found | {len(self.vit.blocks): vit.forward_head(vit.norm(tokens.x))}

    @torch.no_grad()
    def top1(self, batches: Batches) -> dict[int, float]:
        """Return number of blocks -> percent of the images that are classified rightly.

        Raises:
            ValueError: If there are no images.
        """
        self.eval()
        self.mask()
        hits: dict[int, list[Tensor]] = {}
        for images, labels in batches:
            for count, logits in self.logits(images.to(self.device)).items():
                hits.setdefault(count, []).append(logits.argmax(dim=1).cpu() == labels.cpu())
        if not hits:
            raise ValueError("there are no validation images to choose the depth on; give some")
        return {count: 100.0 * torch.cat(h).float().mean().item() for count, h in hits.items()}

    @torch.no_grad()
    def margins(self) -> Scores:
        """Return site -> how far a unit's rank lies above the threshold, as a share of all units.

        Half a unit is added, so that the lowest one kept lies half its own share above 0: one of
        four heads goes together with an eighth of the neurons, and comes back so too.
        """
        return {
            site: (ranks(scores, ties) + 0.5) / len(scores) - 1.0 + kept_fraction(beta, len(scores))
            for site, scores, beta, ties in self.by_site()
        }


def _exits(method: WDPruning, shape: ViTShape) -> list[int]:
    """Return the number of blocks in front of each exit, checked."""
    if "block" not in method.units:
        return []
    counts = [i + 1 for i, block in enumerate(shape.blocks) if block.heads + block.hidden][:-1]
    if wrong := [count for count in method.exits if count not in counts]:
        raise ValueError(f"option exits of {method.name} has {wrong[0]}; give some of {counts}")
    return list(method.exits) or counts[-2:]
