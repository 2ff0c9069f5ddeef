"""Torch-Pruning's global pruning of heads and neurons, at budgets that are spread evenly.

Needs `pip install torch-pruning==1.6.1`. The plain timm model is cut by Torch-Pruning alone (Fang
et al., 2023, arXiv:2301.12900), as its own example for timm's ViTs does it: `num_heads` is given,
whole heads go, and the residual stream stays. What is left is then loaded into a `PrunableViT` of
the same shape, checked to give the same logits, so that cost and tuning are those of all arms.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torch_pruning as tp
from quality_ladders import Cut, budgets
from quality_problem import HIGH, LOW, SAMPLE, Bench
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import PrunableViT, ViTShape, cost_of
from pruners.model.files import read_safetensors
from pruners.model.surgery import cut_to_shape

MOST_HEADS = 0.7
"""Largest share of heads; above, a block would lose all of them, which Torch-Pruning then skips."""

RATIOS = [step / 100 for step in range(1, 100)]
"""Pruning ratios that are tried to find the budgets' ones."""

ALIKE = 1e-4
"""Largest difference of a logit between the timm model and what it is loaded into."""


def torch_pruning(bench: Bench, count: int, criterion: str) -> Iterator[Cut]:
    """Cut by global magnitude or global first-order Taylor scores.

    Args:
        bench: Model and images.
        count: Budgets.
        criterion: "magnitude" or "taylor".
    """
    vit = timm_model()
    gradients = mean_gradients(vit, bench) if criterion == "taylor" else {}
    costs: dict[float, float] = {}
    for ratio in RATIOS:
        shape = shape_of(bench.shape, pruned(vit, ratio, criterion, gradients))
        cost = cost_of(shape).macs / bench.dense_macs
        # A layer that would go as a whole stays as a whole, and larger ratios then cut less.
        if cost < min(costs.values(), default=1.0):
            costs[ratio] = cost
    inside = {ratio: cost for ratio, cost in costs.items() if LOW <= cost <= HIGH}
    for budget in budgets(count):
        ratio = min(inside, key=lambda r: abs(inside[r] - budget))

        def make(ratio: float = ratio) -> PrunableViT:
            return as_prunable(bench, pruned(vit, ratio, criterion, gradients))

        yield f"{inside[ratio]:.4f}x {criterion}, ratio {ratio:.2f}", inside[ratio], make


def timm_model() -> VisionTransformer:
    """Return the sample's model as timm has it."""
    state, args = read_safetensors(SAMPLE / "vit_cifar10.safetensors")
    vit = VisionTransformer(**(args or {}))
    vit.load_state_dict(state)
    return vit.eval()


def mean_gradients(vit: VisionTransformer, bench: Bench) -> dict[str, Tensor]:
    """Return the gradients of the mean loss of the calibration images."""
    vit.zero_grad()
    batches = list(bench.calibration)
    for images, labels in batches:
        (F.cross_entropy(vit(images), labels) / len(batches)).backward()
    return {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}


def pruned(
    vit: VisionTransformer, ratio: float, criterion: str, gradients: dict[str, Tensor]
) -> VisionTransformer:
    """Return a copy cut by Torch-Pruning."""
    cut = copy.deepcopy(vit)
    for name, parameter in cut.named_parameters():
        parameter.grad = gradients[name].clone() if gradients else None
    scores = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }
    width = cut.blocks[0].attn.head_dim
    residual = [layer for block in cut.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that are not cut
        tp.pruner.BasePruner(
            cut,
            torch.zeros(1, 3, *cut.patch_embed.img_size),
            importance=scores[criterion](),
            global_pruning=True,
            pruning_ratio=ratio,
            head_pruning_ratio=min(ratio, MOST_HEADS),
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads={block.attn.qkv: block.attn.num_heads for block in cut.blocks},
            ignored_layers=[cut.patch_embed.proj, cut.head, *residual],
            in_channel_groups={},  # the defaults are shared between calls
            out_channel_groups={},
        ).step()
    for block in cut.blocks:  # timm's attention does not look at its layers' sizes
        block.attn.attn_dim = block.attn.proj.in_features
        block.attn.num_heads = block.attn.attn_dim // width
    return cut.eval()


def shape_of(dense: ViTShape, vit: VisionTransformer) -> ViTShape:
    """Return the shape of what Torch-Pruning left of a model of the shape `dense`."""
    blocks = tuple(
        dataclasses.replace(shape, heads=block.attn.num_heads, hidden=block.mlp.fc1.out_features)
        for shape, block in zip(dense.blocks, vit.blocks, strict=True)
    )
    return dataclasses.replace(dense, blocks=blocks)


@torch.no_grad()
def as_prunable(bench: Bench, vit: VisionTransformer) -> PrunableViT:
    """Load a cut timm model into a `PrunableViT`.

    Raises:
        ValueError: If the two do not give the same logits.
    """
    same = bench.copy()
    cut_to_shape(same, shape_of(bench.shape, vit))
    same.vit.load_state_dict(vit.state_dict())
    images, _ = next(iter(bench.calibration))
    difference = float((same.eval()(images) - vit(images)).abs().max())
    if difference > ALIKE:
        raise ValueError(
            f"logits of the cut timm model and of its PrunableViT differ by {difference:.2g}; "
            f"they must not by more than {ALIKE}"
        )
    return same
