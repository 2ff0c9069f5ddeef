from __future__ import annotations

import pytest
import torch

from pruners import load_method
from pruners.saliency.diagonal import hutchinson


def test_negative_curvature_counts_as_none(tiny, batches) -> None:
    vit, obd = tiny(), load_method("obd", hessian="hutchinson", probes=3, seed=4)
    scores = obd.score(vit, batches)
    diagonal = hutchinson(vit, batches, 3, torch.Generator().manual_seed(4))
    for site, layer in vit.linears():
        assert (diagonal[site] < 0).any()
        expected = 0.5 * layer.weight.detach() ** 2 * diagonal[site].clamp(min=0)
        torch.testing.assert_close(scores[site], expected)


def test_at_the_minimum_of_a_quadratic_with_a_diagonal_hessian_the_score_is_the_loss() -> None:
    curvature = torch.rand(7, dtype=torch.double) + 0.1
    w = torch.randn(7, dtype=torch.double)
    for i in range(7):
        removed = w.clone()
        removed[i] = 0.0
        loss = 0.5 * ((removed - w) ** 2 * curvature).sum()
        torch.testing.assert_close(0.5 * w[i] ** 2 * curvature[i], loss)


def test_the_seed_decides(tiny, batches) -> None:
    vit = tiny()
    first, again, other = (load_method("obd", seed=s).score(vit, batches) for s in (1, 1, 2))
    site = "blocks.0.attn.qkv"
    assert torch.equal(first[site], again[site])
    assert not torch.equal(first[site], other[site])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="hessian of obd is 'exact'; give 'gauss_newton'"):
        load_method("obd", hessian="exact")
    with pytest.raises(ValueError, match="probes of obd is 0"):
        load_method("obd", probes=0)
