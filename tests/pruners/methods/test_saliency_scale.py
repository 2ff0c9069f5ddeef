"""What doubling the loss does: gradients and Hessians double, Fisher matrices quadruple."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners import load_method


@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("taylor", {}, 2.0),
        ("obd", {"hessian": "hutchinson"}, 2.0),
        ("obd", {"hessian": "gauss_newton"}, 4.0),  # squared gradients of drawn labels
        ("fisher", {}, 4.0),
        ("woodfisher", {}, 4.0),
        ("mfac", {}, 4.0),
        ("cap", {}, 4.0),
        ("fast_cap", {}, 4.0),
    ],
)
def test_doubling_the_loss(method, options, factor, tiny, batches, monkeypatch) -> None:
    vit, pruner = tiny(), load_method(method, **options)
    single = pruner.score(vit, batches)
    loss = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **more: 2.0 * loss(*args, **more))
    double = pruner.score(vit, batches)
    for site, score in single.items():
        torch.testing.assert_close(double[site], factor * score, rtol=2e-2, atol=1e-12)
