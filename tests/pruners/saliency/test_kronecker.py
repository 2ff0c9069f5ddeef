from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners.saliency.kronecker import drawn_labels, kronecker_factors, true_labels


def test_factors_are_those_of_plain_autograd_image_by_image(tiny, batches) -> None:
    vit = tiny().double()
    batches = [(images.double(), labels) for images, labels in batches]
    fc2, norm = vit.blocks[1].mlp.fc2, vit.blocks[1].attn.k_norm
    found = kronecker_factors(vit, batches, {"fc2": fc2, "keys": norm}, true_labels)
    vit.use_fused_attention(False)
    seen: dict[str, list] = {"a": [], "g": [], "k": [], "gk": []}
    caught: dict[str, torch.Tensor] = {}
    fc2.register_forward_hook(lambda m, a, out: caught.update(a=a[0], out=out))
    norm.register_forward_hook(lambda m, a, out: caught.update(k=out))
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            caught.clear()
            loss = F.cross_entropy(vit(image[None]), label[None])
            g, gk = torch.autograd.grad(loss, [caught["out"], caught["k"]])
            seen["a"].append(caught["a"][0].detach())
            seen["g"].append(g[0])
            seen["k"].append(caught["k"][0].transpose(0, 1).flatten(1).detach())
            seen["gk"].append(gk[0].transpose(0, 1).flatten(1))
    for name, inputs, gradients in (("fc2", "a", "g"), ("keys", "k", "gk")):
        a = torch.cat(seen[inputs])
        outer = torch.stack([g.T @ g for g in seen[gradients]]).mean(0)
        assert torch.allclose(
            found[name].inputs, torch.cov(a.T, correction=0), rtol=1e-4, atol=1e-6
        )
        assert torch.allclose(found[name].outputs, outer, rtol=1e-4, atol=1e-9)


def test_the_model_is_left_as_it_was(tiny, batches) -> None:
    vit = tiny().train()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    places = {"fc2": vit.blocks[0].mlp.fc2}
    kronecker_factors(vit, batches, places, true_labels)
    assert vit.training
    assert all(p.grad is None for p in vit.parameters())
    assert not vit.blocks[0].mlp.fc2._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_labels_are_drawn_from_the_models_answers() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).expand(20_000, 3)
    draw = drawn_labels(torch.Generator().manual_seed(0))
    drawn = draw(logits, torch.zeros(20_000, dtype=torch.long))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares, logits[0].softmax(0), atol=0.015)


def test_no_images_are_refused(tiny) -> None:
    vit = tiny()
    with pytest.raises(ValueError, match="no calibration images; give at least one batch"):
        kronecker_factors(vit, [], {"fc2": vit.blocks[0].mlp.fc2}, true_labels)
