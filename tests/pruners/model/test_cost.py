from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from tests.models import VARIANTS, images_for

FULL_SIZE = [
    "vit_tiny_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch32_384",
    "vit_medium_patch16_gap_256",
]


def counted_macs(vit: PrunableViT) -> float:
    vit.use_fused_attention(False)  # the counter misses the fused kernel on CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, count=1))
    return counter.get_total_flops() / 2


def cut_everywhere(vit: PrunableViT) -> Plan:
    kinds = ["head", "qk_dim", "v_dim", "neuron"]
    depth = len(vit.blocks)
    units = {"blocks.0.attn.head": 0.4, "blocks.1.attn.v_dim": 0.6, "blocks.1.mlp.neuron": 0.55}
    if not vit.shape().qk_norm:
        units["blocks.1.attn.qk_dim"] = 0.3
    if depth > 3:
        units |= {"blocks.3.mlp.neuron": 1.0, "blocks.4.attn.head": 1.0}
    return Plan(
        steps=(
            Step(
                pruner=load_method("grouped", criterion="magnitude", units=kinds, compensate=False),
                thresholds=units,
            ),
            Step(
                pruner=load_method("evit"),
                thresholds={"blocks.0.token": 0.2, "blocks.2.token": 0.3},
            ),
            Step(
                pruner=load_method("magnitude"),
                thresholds={"blocks.1.mlp.fc1": 0.7, "blocks.2.attn.qkv": 0.4},
            ),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_closed_form_equals_the_flop_counter_at_full_size(name: str) -> None:
    vit = PrunableViT.from_timm(name, pretrained=False).eval()
    assert cost_of(vit.shape()).macs == pytest.approx(counted_macs(vit), rel=5e-3)
    cut_everywhere(vit).apply(vit)
    pruned = cost_of(vit.shape())
    assert pruned.macs == pytest.approx(counted_macs(vit), rel=5e-3)
    assert pruned.params == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_exact(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    for plan in (Plan(), cut_everywhere(vit)):
        plan.apply(vit)
        cost = cost_of(vit.shape())
        assert cost.macs == counted_macs(vit)
        assert cost.params == sum(p.numel() for p in vit.parameters())
        zeros = sum(int((layer.weight == 0).sum()) for _, layer in vit.linears())
        assert cost.params - cost.nonzeros == zeros


def test_published_macs_of_deit_small() -> None:
    vit = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False)
    cost = cost_of(vit.shape())
    assert cost.gmacs == pytest.approx(4.5989, abs=5e-5)
    assert cost.params == 22_050_664


def test_effective_macs_are_macs_times_density_layer_by_layer(tiny) -> None:
    vit = tiny()
    dense = cost_of(vit.shape())
    magnitude = load_method("magnitude")
    site = "blocks.1.mlp.fc2"
    Plan(steps=(Step(pruner=magnitude, thresholds={site: 0.25}),)).apply(vit)
    masked = cost_of(vit.shape())
    layer = dict(vit.linears())[site]
    tokens = vit.shape().blocks[1].mlp_tokens
    assert masked.macs == dense.macs
    assert dense.effective_macs - masked.effective_macs == tokens * layer.weight.numel() // 4
    assert masked.density == (dense.params - layer.weight.numel() // 4) / dense.params
