from __future__ import annotations

import copy

import pytest
import torch

from pruners import Plan, Step, cost_of, load_method
from pruners.model.tokens import Tokens
from pruners.model.vit import Block
from tests.models import images_for

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


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher"])
def test_scores_of_channels_sum_what_reads_and_what_writes_them(
    criterion: str, tiny, batches
) -> None:
    vit = tiny()
    weights = load_method(criterion).score(vit, batches)
    scores = load_method("grouped", criterion=criterion, units=("width",)).score(vit, batches)
    assert list(scores) == ["width"]
    for channel in (0, 7, 23):
        total = 0.0
        for index in range(3):
            name = f"blocks.{index}"
            total += weights[f"{name}.attn.qkv"][:, channel].sum()
            total += weights[f"{name}.attn.proj"][channel].sum()
            total += weights[f"{name}.mlp.fc1"][:, channel].sum()
            total += weights[f"{name}.mlp.fc2"][channel].sum()
        torch.testing.assert_close(scores["width"][channel], total)


def test_the_channels_with_the_lowest_scores_go(tiny) -> None:
    vit = tiny()
    dense, grouped = copy.deepcopy(vit), load_method("grouped", units=("neuron", "width"))
    scores = {"width": torch.randn(24), "blocks.1.mlp.neuron": torch.randn(96)}
    grouped.cut(vit, scores, {"width": 0.75, "blocks.1.mlp.neuron": 0.5})
    kept = scores["width"].argsort(descending=True)[:6].sort().values
    neurons = scores["blocks.1.mlp.neuron"].argsort(descending=True)[:48].sort().values
    assert torch.equal(vit.vit.head.weight, dense.vit.head.weight[:, kept])
    fc1 = dense.blocks[1].mlp.fc1.weight[neurons][:, kept]
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, fc1)


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


def test_a_gate_on_a_neuron_has_the_gradient_of_the_weights_behind_it(tiny, batches) -> None:
    # After the activation: the column of fc2. Before it: the row of fc1 and its bias. They differ.
    vit = tiny()
    images, labels = batches[0]
    mlp = vit.blocks[1].mlp
    after = torch.ones(96, requires_grad=True)
    before = torch.ones(96, requires_grad=True)
    hooks = [
        mlp.act.register_forward_pre_hook(lambda module, inputs: (inputs[0] * before,)),
        mlp.act.register_forward_hook(lambda module, inputs, output: output * after),
    ]
    loss = torch.nn.functional.cross_entropy(vit(images), labels)
    parameters = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight]
    g_after, g_before, g1, b1, g2 = torch.autograd.grad(loss, [after, before, *parameters])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(g_after, (g2 * mlp.fc2.weight).sum(0), rtol=1e-3, atol=1e-6)
    row = (g1 * mlp.fc1.weight).sum(1) + b1 * mlp.fc1.bias
    torch.testing.assert_close(g_before, row, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(g_after, g_before, rtol=0.1)
    # The sum of absolute values that `grouped` takes bounds both of them together.
    scores = load_method("grouped").score(vit, batches[:1])["blocks.1.mlp.neuron"]
    assert (scores >= (g_after.abs() + (row - b1 * mlp.fc1.bias).abs()) * 0.999 - 1e-7).all()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_on_a_trained_vit_scores_rank_heads_like_ablation_does() -> None:
    from pathlib import Path

    from scipy.stats import spearmanr

    from pruners import PrunableViT
    from search.data.decode import ImageSpec
    from search.data.images import open_images

    sample = Path(__file__).parents[3] / "search" / "sample"
    spec = ImageSpec(
        size=(32, 32), channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    )
    images = open_images(str(sample / "val.parquet"), spec)
    data = list(images.batches(64, seed=2, augment=False))[:6]
    vit = PrunableViT.from_safetensors(sample / "vit_cifar10.safetensors").eval()
    vit.use_fused_attention(False)

    def loss(inputs: list[Tokens], blocks: list[Block]) -> float:
        """The loss when these blocks, the last ones, get these tokens."""
        total = 0.0
        for tokens, (_, labels) in zip(inputs, data, strict=True):
            for block in blocks:
                tokens = block(tokens)
            logits = vit.classify(tokens._replace(x=vit.vit.norm(tokens.x)))
            total += torch.nn.functional.cross_entropy(logits, labels).item()
        return total

    changes = []
    with torch.no_grad():
        inputs = [Tokens(vit.embed(images)) for images, _ in data]
        dense = sum(torch.nn.functional.cross_entropy(vit(x), y).item() for x, y in data)
        assert loss(inputs, vit.blocks) == dense
        for number, block in enumerate(vit.blocks):
            kept = block.attn.proj.weight.detach().clone()
            for head in range(4):
                block.attn.proj.weight[:, 32 * head : 32 * head + 32] = 0.0
                changes.append(loss(inputs, vit.blocks[number:]) - dense)
                block.attn.proj.weight.copy_(kept)
            inputs = [block(tokens) for tokens in inputs]  # what stands before is not changed
    correlations = {}
    for criterion in ("magnitude", "taylor", "fisher"):
        scores = load_method("grouped", criterion=criterion).score(vit, data)
        ranked = torch.cat([scores[f"blocks.{i}.attn.head"] for i in range(6)])
        correlations[criterion] = spearmanr(ranked.numpy(), changes).statistic
    assert correlations["taylor"] > 0.35
    assert correlations["fisher"] > 0.35
    assert min(correlations["taylor"], correlations["fisher"]) > correlations["magnitude"] + 0.1
