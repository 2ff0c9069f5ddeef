from __future__ import annotations

import copy

import pytest
import torch

from pruners.model.gates import SLOTS, add_gates, fold_gates, hard, linear_macs, remove_gates
from tests.models import VARIANTS, images_for

FOLDED = {"query": 24, "key": 24, "mixed": 24, "neuron": 96}


def values(slot: str):
    torch.manual_seed(len(slot))
    if slot in ("query", "key"):
        return torch.rand(3, 1, 8) + 0.5
    return torch.rand(96 if "neuron" in slot else 24) + 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_gates_change_nothing_and_leave_nothing(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    images, before = images_for(vit), copy.deepcopy(vit)
    expected = vit(images)
    gates = add_gates(vit, *SLOTS)
    assert [set(slots) for slots in gates] == [set(SLOTS)] * 3
    assert torch.equal(vit(images), expected)
    remove_gates(vit)
    assert str(vit) == str(before)
    assert list(vit.state_dict()) == list(before.state_dict())


def test_a_branch_that_is_gone_has_no_slots(tiny) -> None:
    vit = tiny()
    block = vit.blocks[1]
    block.norm1 = block.attn = block.ls1 = None
    gates = add_gates(vit, *SLOTS)
    assert set(gates[1]) == {"tokens2", "pre_neuron", "neuron", "mlp_out"}


def rows_of(vit, slot: str):
    """The linear layer whose outputs pass a slot, and which rows they are."""
    attn, mlp = vit.blocks[1].attn, vit.blocks[1].mlp
    return {
        "query": (attn.qkv, slice(0, 24)),
        "key": (attn.qkv, slice(24, 48)),
        "mixed": (attn.qkv, slice(48, 72)),
        "attn_out": (attn.proj, slice(None)),
        "pre_neuron": (mlp.fc1, slice(None)),
        "mlp_out": (mlp.fc2, slice(None)),
    }[slot]


@pytest.mark.parametrize("slot", ["query", "key", "mixed", "attn_out", "pre_neuron", "mlp_out"])
def test_a_gate_multiplies_the_rows_of_the_layer_before_it(slot: str, tiny) -> None:
    vit, scaled = tiny(), tiny()
    factors = values(slot)
    add_gates(vit, slot)[1][slot].value = factors
    layer, rows = rows_of(scaled, slot)
    with torch.no_grad():
        layer.weight[rows] *= factors.flatten().unsqueeze(1)
        layer.bias[rows] *= factors.flatten()
    images = images_for(vit)
    torch.testing.assert_close(vit(images), scaled(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slot", FOLDED)
@pytest.mark.parametrize("variant", ["vit", "layer_scale", "pooled"])
def test_folding_is_exact(slot: str, variant: str, tiny) -> None:
    vit, images = tiny(**VARIANTS[variant]), images_for(tiny(**VARIANTS[variant]))
    gates = add_gates(vit, slot)
    for slots in gates:
        slots[slot].value = values(slot)
    expected = vit(images)
    fold_gates(vit, gates)
    assert all(slots[slot].value is None for slots in gates)
    remove_gates(vit)
    torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=0)


def test_what_has_no_layer_beside_it_is_not_folded(tiny) -> None:
    vit = tiny()
    gates = add_gates(vit, "tokens1")
    gates[0]["tokens1"].value = torch.ones(7, 1)
    with pytest.raises(AssertionError, match="tokens1 cannot be folded"):
        fold_gates(vit, gates)


def test_a_hard_gate_has_the_soft_ones_gradient() -> None:
    x = torch.tensor([0.2, -1.0, 3.0], requires_grad=True)
    gate = hard(torch.sigmoid(x), torch.tensor([True, False, True]))
    assert gate.tolist() == [1.0, 0.0, 1.0]
    (found,) = torch.autograd.grad(gate.sum(), x)
    (wanted,) = torch.autograd.grad(torch.sigmoid(x).sum(), x)
    assert torch.equal(found, wanted)


def test_multiply_adds_with_real_sizes_meet_the_costs_of_whole_ones(tiny) -> None:
    from pruners import cost_of, load_method

    shape = tiny(patch_size=4).shape()
    grouped = load_method("grouped", units=("head", "qk_dim", "neuron"))
    cut = {"blocks.1.attn.head": 0.3, "blocks.1.attn.qk_dim": 0.5, "blocks.1.mlp.neuron": 0.25}
    after = grouped.shrink(shape, cut).blocks[1]
    sizes = [(3 * 8, 3 * 8, 96), (after.heads * after.qk_dim, after.heads * 8, after.hidden)]
    before, left = (
        linear_macs(shape, 1, *(torch.tensor(float(n)) for n in size)) for size in sizes
    )
    saved = cost_of(shape).macs - cost_of(grouped.shrink(shape, cut)).macs
    assert (before - left).item() == saved
