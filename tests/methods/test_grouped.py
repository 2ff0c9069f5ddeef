from __future__ import annotations

import copy

import pytest
import torch

from pruners import Plan, Step, cost_of, load_method
from tests.conftest import images_for

ALL = ("head", "qk_dim", "v_dim", "neuron")


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_scores_sum_the_weights_of_a_unit(criterion: str, tiny, batches) -> None:
    vit = tiny()
    weights = load_method(criterion).score(vit, batches)
    scores = load_method("grouped", criterion=criterion, units=ALL).score(vit, batches)
    attn = vit.blocks[1].attn
    qkv, proj = weights["blocks.1.attn.qkv"], weights["blocks.1.attn.proj"]
    for head in range(3):
        total = 0.0
        for dim in range(8):
            at = head * 8 + dim
            qk = qkv[at].sum() + qkv[24 + at].sum()
            v = qkv[48 + at].sum() + proj[:, at].sum()
            torch.testing.assert_close(scores["blocks.1.attn.qk_dim"][head, dim], qk)
            torch.testing.assert_close(scores["blocks.1.attn.v_dim"][head, dim], v)
            total += qk + v
        torch.testing.assert_close(scores["blocks.1.attn.head"][head], total)
    fc1, fc2 = weights["blocks.2.mlp.fc1"], weights["blocks.2.mlp.fc2"]
    for neuron in (0, 17, 95):
        expected = fc1[neuron].sum() + fc2[:, neuron].sum()
        torch.testing.assert_close(scores["blocks.2.mlp.neuron"][neuron], expected)
    assert attn.heads == 3


def test_the_units_with_the_lowest_scores_go(tiny) -> None:
    vit = tiny()
    grouped = load_method("grouped", criterion="magnitude", units=ALL)
    scores = grouped.score(vit, [])
    dense = copy.deepcopy(vit)
    thresholds = {
        "blocks.0.attn.head": 1 / 3,
        "blocks.0.attn.v_dim": 0.5,
        "blocks.1.mlp.neuron": 0.75,
    }
    grouped.cut(vit, scores, thresholds)
    heads = scores["blocks.0.attn.head"].argsort(descending=True)[:2].sort().values.tolist()
    rows = []
    for head in heads:
        best = scores["blocks.0.attn.v_dim"][head].argsort(descending=True)[:4].sort().values
        rows += [48 + head * 8 + dim for dim in best.tolist()]
    kept_v = vit.blocks[0].attn.qkv.weight[2 * 16 :]
    assert torch.equal(kept_v, dense.blocks[0].attn.qkv.weight[rows])
    neurons = scores["blocks.1.mlp.neuron"].argsort(descending=True)[:24].sort().values
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, dense.blocks[1].mlp.fc2.weight[:, neurons])


def test_matrices_get_smaller_and_the_model_runs(tiny, batches) -> None:
    vit = tiny()
    grouped = load_method("grouped", units=ALL)
    plan = Plan(
        steps=(Step(pruner=grouped, thresholds=dict.fromkeys(grouped.sites(vit.shape()), 0.5)),)
    )
    before = cost_of(vit.shape())
    plan.apply(vit, batches)
    after = cost_of(vit.shape())
    assert after.params == sum(p.numel() for p in vit.parameters()) < 0.55 * before.params
    assert vit(images_for(vit)).shape == (3, 5)


def test_a_share_of_one_removes_the_branch(tiny) -> None:
    vit = tiny()
    grouped = load_method("grouped", criterion="magnitude")
    thresholds = {"blocks.1.attn.head": 1.0, "blocks.1.mlp.neuron": 1.0}
    shape = grouped.shrink(vit.shape(), thresholds)
    grouped.cut(vit, grouped.score(vit, []), thresholds)
    assert vit.blocks[1].attn is None
    assert vit.blocks[1].mlp is None
    assert vit.shape() == shape
    assert "blocks.1.attn.head" not in grouped.sites(shape)


def test_a_share_below_one_leaves_at_least_one_unit(tiny) -> None:
    vit = tiny()
    shape = load_method("grouped").shrink(
        vit.shape(), {"blocks.0.attn.head": 0.99, "blocks.0.mlp.neuron": 0.999}
    )
    assert (shape.blocks[0].heads, shape.blocks[0].hidden) == (1, 1)


def test_allocation_cuts_the_layer_that_matters_least(tiny) -> None:
    vit = tiny()
    with torch.no_grad():
        for layer in (vit.blocks[1].mlp.fc1, vit.blocks[1].mlp.fc2):
            layer.weight.mul_(0.01)
    grouped = load_method("grouped", criterion="magnitude", units=("neuron",))
    thresholds = grouped.allocate(
        vit.shape(), grouped.score(vit, []), 0.85 * cost_of(vit.shape()).macs
    )
    assert thresholds["blocks.1.mlp.neuron"] > 0.5
    assert thresholds["blocks.0.mlp.neuron"] == thresholds["blocks.2.mlp.neuron"] == 0.0


def test_wrong_options_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"units of grouped is \['heads'\]; give some of"):
        load_method("grouped", units=["heads"])
    with pytest.raises(
        ValueError, match="criterion of grouped is 'evit'; give a method of the weight family"
    ):
        load_method("grouped", criterion="evit")
    with pytest.raises(ValueError, match=r"v_dim is 1; give a share below 1"):
        load_method("grouped", units=ALL).shrink(tiny().shape(), {"blocks.0.attn.v_dim": 1.0})
