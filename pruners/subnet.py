"""Subnets: physically smaller models whose weights are those of one dense model.

Surgery selects rows, columns and channels, masks zero, and reducers without parameters add nothing;
so each parameter of a cut model is a part of the dense parameter of the same name, perhaps with
zeros. Which part is read off a model whose parameters hold their own positions and which is cut in
the same way; what a cut does inside need not be known.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruners.families.learned import Learned, LearnedPruner
from pruners.families.pruner import Pruner
from pruners.model.attention import Attention
from pruners.model.numbered import numbered, positions_of
from pruners.model.shape import BlockShape, ViTShape
from pruners.model.sites import RAGGED, WIDTH, ragged_site
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT
from pruners.plan import Plan


class _Part(NamedTuple):
    """A parameter of a subnet as a part of a dense one.

    Attributes:
        whole: The dense parameter.
        part: The subnet's parameter.
        positions: [part.numel()], positions in the flat dense parameter; 0 for zeros.
        zeros: Where the part is zero whatever the dense weights are, of its shape; None if nowhere.
    """

    whole: nn.Parameter
    part: nn.Parameter
    positions: Tensor
    zeros: Tensor | None


class Subnet:
    """A smaller model that shares the weights of a dense model.

    Train it so: `refresh`, run `vit` forward and backward, `collect`; then step the optimiser of
    the dense model. The gradients are those of the dense model with the cut units masked, and its
    norms over the channels that stay (slimmable networks, Yu et al., 2019, arXiv:1812.08928).

    Attributes:
        vit: The smaller model, in the dense model's mode. Its weights are copies.
    """

    def __init__(self, dense: ViT, plan: Plan, scores: Mapping[Pruner, Scores]) -> None:
        """Cut a plan out of a dense model, which is left as it was.

        Args:
            dense: The model, uncut.
            plan: What is cut; steps that are ramped over epochs are cut as far as they ever go.
            scores: Method -> its scores of the dense model. A later step takes those of what the
                earlier ones have left.

        Raises:
            ValueError: If the plan does not fit, or if a method has no scores or adds parameters of
                its own.
        """
        shape = dense.shape()
        plan.shape(shape)  # refuses what cannot be
        own, vit, cut = dict(dense.named_parameters()), numbered(dense), False
        for step in plan.steps:
            if step.active:
                left = _scores_left(step.pruner, scores, vit, shape if cut else None)
                with torch.no_grad():
                    step.pruner.cut(vit, left, step.thresholds)
                _refuse_new_parameters(vit, own, step.pruner)
                cut = cut or step.pruner.family == "unit"
        self.vit = vit
        self._parts = [
            _part(vit, name, numbers, own[name]) for name, numbers in list(vit.named_parameters())
        ]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights of the dense model, as they are now."""
        for whole, part, positions, zeros in self._parts:
            torch.index_select(whole.flatten(), 0, positions, out=part.view(-1))
            if zeros is not None:
                part.masked_fill_(zeros, 0.0)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients to those of the dense parameters, and forget them here."""
        for whole, part, positions, zeros in self._parts:
            if part.grad is None:
                continue
            gradient = part.grad if zeros is None else part.grad.masked_fill(zeros, 0.0)
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole, memory_format=torch.contiguous_format)
            whole.grad.view(-1).index_add_(0, positions, gradient.flatten())
            part.grad = None


def shared_scores(
    dense: ViT,
    plans: Iterable[Plan],
    batches: Batches,
    learned: Mapping[Pruner, Learned],
) -> dict[Pruner, Scores]:
    """Measure the scores with which subnets are cut, once for each method of some plans.

    Args:
        dense: The dense model, which is left as it was.
        plans: The plans.
        batches: Calibration batches, iterated anew by each method.
        learned: What is known of this model already: scores, and weights learned with them.

    Returns:
        Method -> its scores of the dense model.

    Raises:
        ValueError: If a method does more than select weights, so that its models cannot share
            them; the message names the method.
    """
    steps = {step.pruner: step for plan in plans for step in plan.steps if step.active}
    scores = {
        pruner: learned[pruner].scores if pruner in learned else pruner.score(dense, batches)
        for pruner in steps
    }
    for pruner, step in steps.items():
        cut = copy.deepcopy(dense)
        if isinstance(pruner, LearnedPruner):
            known = learned.get(pruner, Learned(scores=scores[pruner]))
            pruner.cut_learned(cut, known, step.thresholds)
        elif pruner.family == "unit":  # by the same scores, lest rounding choose other units
            pruner.cut(cut, scores[pruner], step.thresholds)
        else:
            pruner.prune(cut, batches, step.thresholds)
        _refuse_changed_weights(Subnet(dense, Plan(steps=(step,)), scores), cut, pruner)
    return scores


def _refuse_changed_weights(subnet: Subnet, cut: ViT, pruner: Pruner) -> None:
    """Refuse a method whose models, cut as in a trial, have other weights than its subnets."""
    shared = dict(subnet.vit.named_parameters())
    for name, after in cut.named_parameters():
        # A method that scores again may mask other weights, but what it keeps is the same.
        kept = shared.get(name)
        if (
            kept is None
            or after.shape != kept.shape
            or not bool(((after == kept) | (after == 0.0) | (kept == 0.0)).all())
        ):
            raise ValueError(
                f"{pruner.name} changes the weights that it keeps ({name}), so its models "
                "cannot share those of the dense model; leave it out"
            )


def _part(vit: ViT, name: str, numbers: Tensor, whole: nn.Parameter) -> _Part:
    """Put a parameter in the place of its numbers."""
    empty = torch.empty(numbers.shape, dtype=whole.dtype, device=whole.device)
    part = nn.Parameter(empty, requires_grad=whole.requires_grad)
    owner, _, leaf = name.rpartition(".")
    setattr(vit.get_submodule(owner), leaf, part)
    zeros = numbers == 0.0
    positions = (numbers.detach().flatten().long() - 1).clamp_min_(0)
    return _Part(whole, part, positions, zeros if bool(zeros.any()) else None)


def _refuse_new_parameters(vit: ViT, own: Mapping[str, nn.Parameter], pruner: Pruner) -> None:
    for name, _ in vit.named_parameters():
        if name not in own:
            raise ValueError(
                f"{pruner.name} adds weights of its own ({name}), which the dense model does not "
                "have to share; leave it out"
            )


def _scores_left(
    pruner: Pruner,
    scores: Mapping[Pruner, Scores],
    vit: ViT,
    dense: ViTShape | None,
) -> Scores:
    """Return a method's scores of what is left of a numbered model.

    Args:
        pruner: The method.
        scores: Method -> its scores of the dense model.
        vit: The numbered model.
        dense: The dense model's shape; None if no units have been cut.
    """
    if pruner.family == "token":
        return {}
    if pruner not in scores:
        raise ValueError(f"there are no scores of {pruner.name}; give those of the dense model")
    own = scores[pruner]
    if dense is None:
        return own
    if pruner.family == "weight":
        return {
            site: own[site].flatten()[positions_of(layer.weight).to(own[site].device)]
            for site, layer in vit.linears()
        }
    return {**own, **dict(_unit_scores(own, vit, dense))}


def _unit_scores(own: Scores, vit: ViT, dense: ViTShape) -> Iterator[tuple[str, Tensor]]:
    """Yield (site, scores) of the heads, dims, neurons and channels that are left."""
    patches = vit.vit.patch_embed.proj.weight.flatten(1)
    channels = positions_of(patches[:, 0]) // patches.shape[1]
    if WIDTH in own:
        yield WIDTH, own[WIDTH][channels.to(own[WIDTH].device)]
    for index, (block, before) in enumerate(zip(vit.blocks, dense.blocks, strict=True)):
        name = f"blocks.{index}"
        left = {
            f"{name}.{kind}": channels if rows is None else channels[rows]
            for kind, rows in (("attn.attn_out", block.attn_rows), ("mlp.mlp_out", block.mlp_rows))
        }
        if block.attn is not None:
            qk, v = _dims_left(block.attn, before, dense.dim)
            heads = v[:, 0] // before.v_dim
            left |= {f"{name}.attn.head": heads, f"{name}.attn.qk_dim": qk}
            left |= {f"{name}.attn.v_dim": v, f"{name}.attn.dim": v}
            yield from _ragged_scores(own, index, heads.tolist(), v % before.v_dim)
        if block.mlp is not None:
            left[f"{name}.mlp.neuron"] = positions_of(block.mlp.fc1.weight[:, 0]) // dense.dim
        for site, units in left.items():
            if site in own:
                yield site, own[site].flatten()[units.to(own[site].device)]


def _dims_left(attn: Attention, before: BlockShape, dim: int) -> tuple[Tensor, Tensor]:
    """Return the dense numbers, over all heads, of the q/k dims [H, K] and the v dims [H, V]."""
    rows = positions_of(attn.qkv.weight[:, 0]) // dim
    q, _, v = rows.split([attn.heads * attn.qk_dim] * 2 + [attn.heads * attn.v_dim])
    v = v - 2 * before.heads * before.qk_dim
    return q.view(attn.heads, -1), v.view(attn.heads, -1)


def _ragged_scores(
    own: Scores, index: int, heads: list[int], v_dims: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the scores of the dims [V] of the heads that are left, under their new numbers."""
    for kind in RAGGED:
        for head, before in enumerate(heads):
            if (site := ragged_site(index, before, kind)) in own:
                dims = v_dims[head].to(own[site].device)
                yield ragged_site(index, head, kind), own[site][dims]
