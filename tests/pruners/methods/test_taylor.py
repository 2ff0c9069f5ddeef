from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners import load_method


def test_score_is_the_mean_over_batches_of_weight_times_gradient(tiny, batches) -> None:
    vit = tiny()
    scores = load_method("taylor", num_batches=2).score(vit, batches)
    layers = dict(vit.linears())
    expected = {site: torch.zeros_like(layer.weight) for site, layer in layers.items()}
    for images, labels in batches[:2]:
        vit.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        for site, layer in layers.items():
            expected[site] += (layer.weight * layer.weight.grad).abs().detach() / 2
    for site in scores:
        torch.testing.assert_close(scores[site], expected[site])


def test_score_predicts_the_loss_change_of_a_small_weight(tiny, batches) -> None:
    vit = tiny().double()
    images, labels = batches[0][0].double(), batches[0][1]
    site = "blocks.1.attn.proj"
    weight = dict(vit.linears())[site].weight
    scores = load_method("taylor").score(vit, [(images, labels)])[site]
    with torch.no_grad():
        loss = F.cross_entropy(vit(images), labels)
        for row, column in ((0, 0), (5, 17), (23, 2)):
            kept = weight[row, column].item()
            weight[row, column] = kept * (1 - 1e-5)  # a finite difference towards zero
            change = (F.cross_entropy(vit(images), labels) - loss).abs() / 1e-5
            weight[row, column] = kept
            assert change.item() == pytest.approx(scores[row, column].item(), rel=1e-3, abs=1e-9)


def test_doubling_the_loss_of_a_batch_does_not_cancel_its_opposite(tiny, batches) -> None:
    # Gradients of opposite batches cancel in their mean, their absolute values do not.
    vit = tiny()
    images, labels = batches[0]
    scores = load_method("taylor").score(vit, [(images, labels), (images, (labels + 2) % 5)])
    assert all(score.sum() > 0 for score in scores.values())


def test_frozen_layers_and_missing_batches_are_refused(tiny, batches) -> None:
    vit = tiny()
    with pytest.raises(ValueError, match="no batches"):
        load_method("taylor").score(vit, [])
    vit.blocks[1].mlp.fc1.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1 is frozen"):
        load_method("taylor").score(vit, batches)
    with pytest.raises(ValueError, match="num_batches of taylor is 0"):
        load_method("taylor", num_batches=0)
