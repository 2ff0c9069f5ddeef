"""ViT-Slim: L1 on soft masks over head dims, neurons and patches; one search for all budgets.

A. Chavan, Z. Shen, Z. Liu, Z. Liu, K.-T. Cheng, E. Xing (2022), arXiv:2201.00814. Departures:

- The soft masks are folded into the weights before the cut, so that short fine-tuning starts where
  the search ended; the paper throws them away and trains for 300 epochs.
- The first block sees every patch: a patch that block i + 1 does not want leaves behind the
  attention of block i. With a class token this is the same function.
- Masks have an optimiser of their own without weight decay, whose rate follows from the length of
  the run: in the paper's 62,000 steps a mask can fall from 1 to 0 at the weights' rate, in some
  hundred it cannot.
- The L1 terms are means over all masks of a kind, not sums, so that their weights say the same to a
  network of any size. In such means the paper's weights for DeiT-S (2e-4, 5e-5, 1e-4 of sums) are
  0.92, 0.92 and 0.24; those here are 1.6 and 1.3 times as large.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.families.allocation import out_of_reach, smallest
from pruners.families.learned import Learned, LearnedPruner, UnitLearner, model_tensors
from pruners.families.options import option
from pruners.families.token import put_reducers
from pruners.model.cost import cost_of
from pruners.model.gates import add_gates, fold_gates, remove_gates
from pruners.model.shape import ViTShape
from pruners.model.sites import kind_of, ragged_site
from pruners.model.tokens import KeepPatches
from pruners.model.types import Scores, Thresholds
from pruners.model.vit import ViT
from pruners.training.learner import LearningData
from pruners.training.optimisation import autocast, backward, clip_and_step, decayed

PATCH_START = 3.0
"""Where the masks of patches start; they act through tanh, and tanh 3 = 0.995."""

STEPS = 4096
"""Budgets that `allocate` tells apart."""


@dataclass(frozen=True, kw_only=True)
class ViTSlim(LearnedPruner):
    """Ranks the soft masks of each kind of unit over the whole network.

    The loss is cross-entropy + `attn_pull` mean |z_a| + `mlp_pull` mean |z_m| + `patch_pull` mean
    tanh(z_p), means over all blocks together; z_a multiplies q, k and v of a dim alike, z_m a
    neuron behind its activation, tanh(z_p) a patch behind the norms of a block. Weights train too.

    Kinds of units: `ragged_dim` (each head keeps dims of its own), `dim` (the same positions in all
    heads of a block) or `head`; `neuron`; and `token`, whose sites are `blocks.<i>.token`: which
    patches go on from block i, the same ones of every image.

    Attributes:
        attn_pull: Weight of the mean mask of head dims or heads.
        mlp_pull: Weight of the mean mask of neurons.
        patch_pull: Weight of the mean mask of patches.
        travel: How far a mask moves in the run if its gradient always points the same way.
        lr: Learning rate of the weights, constant; the paper's 5e-4 is for batches of 1,024.
        keep_weights: As of every method that learns. Unlike the paper a cut starts from the dense
            weights: what stays, solved anew, is better than what trained under soft masks.
    """

    units: tuple[str, ...] = ("ragged_dim", "neuron")
    attn_pull: float = option(1.5, low=0.0)
    mlp_pull: float = option(1.5, low=0.0)
    patch_pull: float = option(0.3, low=0.0)
    travel: float = option(4.0, above=0.0)
    lr: float = 2e-4
    keep_weights: bool = False

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Dims in one of three ways, neurons, and patches."""
        return ("ragged_dim", "dim", "head", "neuron", "token")

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return the sites of the wanted kinds; patches may leave any block but the last."""
        sites = super().sites(shape)
        if "token" in self.units:
            depth = len(shape.blocks)
            sites |= {
                token_site(i): shape.patches for i in range(depth - 1) if shape.blocks[i].heads
            }
        return sites

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape with fewer units, and with fewer patches from block to block."""
        shape = super().shrink(shape, thresholds)
        counts = patches_kept(shape, thresholds)
        blocks, tokens = [], shape.blocks[0].tokens
        for index, block in enumerate(shape.blocks):
            after = counts[index] + shape.prefix_tokens if index in counts else tokens
            blocks.append(dataclasses.replace(block, tokens=tokens, mlp_tokens=after))
            tokens = after
        return dataclasses.replace(shape, blocks=tuple(blocks)) if counts else shape

    def cut(self, vit: ViT, scores: Scores, thresholds: Thresholds) -> None:
        """Remove units, then put the choice of patches into the blocks."""
        super().cut(vit, scores, thresholds)
        shape = vit.shape()
        counts = patches_kept(shape, thresholds)
        kept = torch.zeros(shape.patches, dtype=torch.bool)
        chosen: dict[int, Tensor] = {}
        for index in sorted(counts, reverse=True):  # what a later block wants, earlier ones keep
            ranking = scores[token_site(index)].cpu().masked_fill(kept, float("inf"))
            kept = torch.zeros_like(kept).index_fill(0, ranking.topk(counts[index]).indices, True)
            chosen[index] = kept
        self.place(vit, thresholds)
        before = torch.ones(shape.patches, dtype=torch.bool)
        for index in sorted(chosen):
            reducer = vit.blocks[index].middle
            assert isinstance(reducer, KeepPatches)
            reducer.keep(chosen[index][before].nonzero().flatten())
            before = chosen[index]

    def place(self, vit: ViT, thresholds: Thresholds) -> None:
        """Put reducers that keep the right number of patches, the first ones, into the blocks."""
        shape = vit.shape()
        reducers = {
            index: KeepPatches(shape.prefix_tokens, count)
            for index, count in patches_kept(shape, thresholds).items()
        }
        put_reducers(vit, self, reducers, thresholds)

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Keep the same share of the masks of every kind, the largest that meets the budget.

        Of n masks of a kind int((1 - share) n) go, the lowest of the whole network (signed).
        """
        own = {site: s if s.dim() == 1 else s[0] for site, s in scores.items()}
        pooled: dict[str, Tensor] = {}
        for site, masks in own.items():
            before = pooled.get(kind_of(site), masks.new_empty(0))
            pooled[kind_of(site)] = torch.cat([before, masks])
        pooled = {kind: masks.sort().values for kind, masks in pooled.items()}

        def shares(step: int) -> dict[str, float]:
            cut = {k: m[int(step / STEPS * m.numel())].item() for k, m in pooled.items()}
            found = {s: (m < cut[kind_of(s)]).double().mean().item() for s, m in own.items()}
            for site, share in found.items():
                if share == 1.0 and kind_of(site) in ("dim", "token"):
                    found[site] = 1.0 - 1.0 / own[site].numel()
            return found

        def cost(step: int) -> int:
            return cost_of(self.shrink(shape, shares(step))).effective_macs

        step = smallest(STEPS - 1, lambda n: cost(n) <= macs)
        if step is None:
            raise out_of_reach(macs, self.shrink(shape, shares(STEPS - 1)))
        return shares(step)

    def learner(self, vit: ViT, data: LearningData) -> ViTSlimLearner:
        """Start with masks of ones, and of tanh 3 on patches."""
        return ViTSlimLearner(self, vit, data.steps * self.epochs)


class ViTSlimLearner(UnitLearner):
    """Weights and masks, trained together.

    Attributes:
        dims: Block -> z_a: [H, K], [1, K] or [H, 1], by the kind of unit.
        neurons: Block -> z_m [F].
        patches: Block -> z_p [N] of the blocks behind the first.
    """

    def __init__(self, method: ViTSlim, vit: ViT, steps: int) -> None:
        """Put gates on what the method's kinds of units are."""
        super().__init__(vit)
        self.method, self.shape = method, vit.shape()
        device = self.device
        slots = ["mixed"] if self.shape.qk_norm else ["query", "key", "mixed"]
        if "neuron" in method.units:
            slots.append("neuron")
        self.unit_gates = add_gates(vit, *slots)
        self.patch_gates = add_gates(
            vit, *(["tokens1", "tokens2"] if "token" in method.units else [])
        )
        self.dims, self.neurons = nn.ParameterDict(), nn.ParameterDict()
        self.patches = nn.ParameterDict()
        for index, block in enumerate(self.shape.blocks):
            if block.heads and (size := _mask_size(method, block.heads, block.v_dim)):
                self.dims[str(index)] = nn.Parameter(torch.ones(size, device=device))
            if block.hidden and "neuron" in method.units:
                self.neurons[str(index)] = nn.Parameter(torch.ones(block.hidden, device=device))
            if index and self.patch_gates[index]:
                start = torch.full((self.shape.patches,), PATCH_START, device=device)
                self.patches[str(index)] = nn.Parameter(start)
        masks = [*self.dims.values(), *self.neurons.values(), *self.patches.values()]
        self.optimizers = {
            "weights": torch.optim.AdamW(decayed(vit.parameters(), 1e-3), lr=method.lr),
            "masks": torch.optim.AdamW(masks, lr=method.travel / steps, weight_decay=0.0),
        }

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Train weights and masks."""
        self.set_gates()
        with autocast(self.device, self.autocast):
            logits = self.vit(images).float()
        loss = F.cross_entropy(logits, labels) + self.penalty()
        backward(loss, self.optimizers.values())
        clip_and_step(self.optimizers.values(), self.vit.parameters())
        return loss

    def conclude(self, data: LearningData) -> Learned:
        """Fold the masks into the weights; the masks are the scores."""
        scores = self.scores()
        spread = torch.cat([s.flatten() for s in scores.values()])
        self.fold()
        report = {"mask_mean": spread.mean().item(), "mask_std": spread.std().item()}
        return Learned(scores=scores, weights=model_tensors(self.vit), report=report)

    def penalty(self) -> Tensor:
        """Return the L1 terms of the loss, []."""
        method = self.method
        dims = [z.abs() for z in self.dims.values()]
        neurons = [z.abs() for z in self.neurons.values()]
        patches = [torch.tanh(z) for z in self.patches.values()]
        kinds = ((method.attn_pull, dims), (method.mlp_pull, neurons), (method.patch_pull, patches))
        pulls = [w * torch.cat([z.flatten() for z in masks]).mean() for w, masks in kinds if masks]
        return torch.stack(pulls).sum()

    def set_gates(self) -> None:
        """Hand the masks to the gates: one vector for q, k and v of a dim."""
        for index, z in self.dims.items():
            block, gates = self.shape.blocks[int(index)], self.unit_gates[int(index)]
            by_head = z.expand(block.heads, block.v_dim)
            gates["mixed"].value = by_head.flatten()
            for slot in gates.keys() & {"query", "key"}:
                gates[slot].value = by_head.unsqueeze(1)  # [H, 1, K]
        for index, z in self.neurons.items():
            # A view: a parameter as such would become one of the gate's own.
            self.unit_gates[int(index)]["neuron"].value = z.view(-1)
        prefix = next(self.vit.parameters()).new_ones(self.shape.prefix_tokens)
        for index, z in self.patches.items():
            for gate in self.patch_gates[int(index)].values():
                gate.value = torch.cat([prefix, torch.tanh(z)]).unsqueeze(1)  # [N, 1]

    @torch.no_grad()
    def scores(self) -> Scores:
        """Return the masks by site; of patches, the largest of a patch's masks from there on."""
        scores: Scores = {}
        for index, z in self.dims.items():
            heads, name = self.shape.blocks[int(index)].heads, f"blocks.{index}.attn"
            if "ragged_dim" in self.method.units:
                scores |= {
                    ragged_site(int(index), head, "ragged_dim"): z[head].clone()
                    for head in range(heads)
                }
            elif "dim" in self.method.units:
                scores[f"{name}.dim"] = z.expand(heads, -1).clone()
            else:
                scores[f"{name}.head"] = z[:, 0].clone()
        scores |= {f"blocks.{i}.mlp.neuron": z.detach().clone() for i, z in self.neurons.items()}
        wanted = self.method.sites(self.shape)
        later: Tensor | None = None
        for block in sorted(map(int, self.patches), reverse=True):
            own = torch.tanh(self.patches[str(block)])
            later = own if later is None else torch.maximum(own, later)
            if token_site(block - 1) in wanted:
                scores[token_site(block - 1)] = later.clone()
        return scores

    def fold(self) -> None:
        """Multiply the masks of units into the weights, and take all gates away."""
        self.set_gates()
        fold_gates(self.vit, self.unit_gates)
        remove_gates(self.vit)


def token_site(index: int) -> str:
    """Return the site of the patches that go on from block `index`."""
    return f"blocks.{index}.token"


def patches_kept(shape: ViTShape, thresholds: Thresholds) -> dict[int, int]:
    """Return, for each block that passes patches on by choice, how many: never more than before.

    A block keeps what any later block wants, so its count is the largest from there on.
    """
    counts: dict[int, int] = {}
    wanted = 1
    for index in reversed(range(len(shape.blocks) - 1)):
        if shape.blocks[index].heads:
            share = thresholds.get(token_site(index), 0.0)
            wanted = max(wanted, shape.patches - int(share * shape.patches + 0.5))
            counts[index] = wanted
    return {index: count for index, count in counts.items() if count < shape.patches}


def _mask_size(method: ViTSlim, heads: int, width: int) -> tuple[int, int] | None:
    sizes = {"ragged_dim": (heads, width), "dim": (1, width), "head": (heads, 1)}
    return next((sizes[unit] for unit in method.units if unit in sizes), None)
