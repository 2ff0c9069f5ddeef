from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from pruners.model.masks import keep_highest
from pruners.saliency.gradients import evaluating, sample_gradients


def test_sample_gradients_equal_a_loop_over_images(tiny, batches) -> None:
    vit = tiny()
    images, labels = batches[0]
    sites = ["blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.2.mlp.fc2"]
    found = sample_gradients(vit, images, labels, sites)
    layers = dict(vit.linears())
    for k in range(len(labels)):
        loss = F.cross_entropy(vit(images[k : k + 1]), labels[k : k + 1])
        expected = torch.autograd.grad(loss, [layers[site].weight for site in sites])
        for site, gradient in zip(sites, expected, strict=True):
            torch.testing.assert_close(found[site][k], gradient, rtol=1e-4, atol=1e-6)


def test_sample_gradients_equal_torch_func(tiny, batches) -> None:
    vit = tiny()
    vit.use_fused_attention(False)
    images, labels = batches[1]
    name = "vit.blocks.1.mlp.fc1.weight"
    others = {k: v.detach() for k, v in vit.named_parameters() if k != name}

    def loss(weight, image, label):
        logits = functional_call(vit, {**others, name: weight}, (image[None],))
        return F.cross_entropy(logits, label[None])

    weight = dict(vit.named_parameters())[name].detach()
    expected = vmap(grad(loss), in_dims=(None, 0, 0))(weight, images, labels)
    found = sample_gradients(vit, images, labels, ["blocks.1.mlp.fc1"])["blocks.1.mlp.fc1"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_on_the_model(tiny, batches) -> None:
    vit = tiny().train()
    vit.use_fused_attention(True)
    with evaluating(vit):
        assert not vit.training
        assert not vit.blocks[0].attn.fused_attn
        sample_gradients(vit, *batches[0], ["blocks.0.attn.qkv"])
    assert vit.training
    assert vit.blocks[0].attn.fused_attn
    assert not any(module._forward_hooks for module in vit.modules())
    assert all(p.grad is None for p in vit.parameters())


def test_an_error_leaves_nothing_either(tiny, batches) -> None:
    vit = tiny()
    with pytest.raises(RuntimeError):
        sample_gradients(vit, batches[0][0][:, :2], batches[0][1], ["blocks.0.attn.qkv"])
    assert not any(module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize("method", ["taylor", "fisher", "obd", "woodfisher"])
def test_shared_weights_are_refused_by_name(method: str, tiny, batches) -> None:
    from pruners import load_method

    vit = tiny()
    vit.blocks[2].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1 shares its weight with blocks\.0"):
        load_method(method).score(vit, batches)


@pytest.mark.parametrize(
    "method", ["taylor", "fisher", "obd", "woodfisher", "mfac", "cap", "fast_cap"]
)
def test_bfloat16_models_score_like_float32(method: str, tiny, batches) -> None:
    from pruners import Plan, Step, load_method

    pruner = load_method(method)
    vit = tiny()
    half = copy.deepcopy(vit).to(torch.bfloat16)
    few = [(images.to(torch.bfloat16), labels) for images, labels in batches]
    site = "blocks.1.mlp.fc1"
    wide, narrow = pruner.score(vit, batches)[site], pruner.score(half, few)[site]
    masks = [keep_highest(scores, wide.numel() // 2) for scores in (wide, narrow)]
    assert (masks[0] == masks[1]).float().mean() > 0.85  # cap's order is the most sensitive
    Plan(steps=(Step(pruner=pruner, thresholds={site: 0.5}),)).apply(half, few)
    weight = dict(half.linears())[site].weight
    assert weight.dtype == torch.bfloat16
    assert int((weight == 0).sum()) == weight.numel() // 2
