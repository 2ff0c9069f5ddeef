from __future__ import annotations

import torch
import torch.nn.functional as F

from pruners import load_method


def test_score_is_half_the_squared_weight_times_the_mean_squared_gradient(tiny, batches) -> None:
    vit = tiny()
    site = "blocks.0.mlp.fc2"
    weight = dict(vit.linears())[site].weight
    squares = [
        torch.autograd.grad(F.cross_entropy(vit(x[k : k + 1]), y[k : k + 1]), weight)[0] ** 2
        for x, y in batches
        for k in range(len(y))
    ]
    expected = 0.5 * weight.detach() ** 2 * torch.stack(squares).mean(0)
    torch.testing.assert_close(
        load_method("fisher").score(vit, batches)[site], expected, rtol=1e-3, atol=1e-9
    )
