from __future__ import annotations

import torch

from pruners import Plan, Step, load_method
from pruners.methods.woodfisher import SimultaneousOBS


def test_scores_and_update_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(30, generator=generator)
    gradients = torch.randn(40, 30, generator=generator)
    curvature = SimultaneousOBS(30, 40, 10, 0.1)
    curvature.add(gradients[:25])
    curvature.add(gradients[25:])
    curvature.check("a")
    damping = 0.1 * float(gradients[:25].square().mean())  # the first gradients set the scale
    keep = torch.ones(30, dtype=torch.bool)
    keep[[1, 4, 5, 12, 29]] = False
    for block in range(3):
        part = slice(10 * block, 10 * block + 10)
        g = gradients[:, part]
        inverse = torch.linalg.inv(g.T @ g / 40 + damping * torch.eye(10))
        expected = w[part] ** 2 / (2 * inverse.diagonal())
        torch.testing.assert_close(curvature.scores(w)[part], expected, rtol=1e-3, atol=1e-5)
        moved = w[part].clone()
        for p in (~keep[part]).nonzero().flatten().tolist():
            moved -= w[part][p] / inverse[p, p] * inverse[:, p]
        moved[~keep[part]] = 0.0
        torch.testing.assert_close(curvature.update(w, keep)[part], moved, rtol=1e-3, atol=1e-5)


def test_survivors_move(tiny, batches) -> None:
    vit = tiny()
    before = dict(vit.linears())["blocks.0.mlp.fc1"].weight.detach().clone()
    step = Step(pruner=load_method("woodfisher"), thresholds={"blocks.0.mlp.fc1": 0.5})
    Plan(steps=(step,)).apply(vit, batches)
    after = dict(vit.linears())["blocks.0.mlp.fc1"].weight
    stays = after != 0
    assert int(stays.sum()) == before.numel() // 2
    assert (after[stays] != before[stays]).float().mean() > 0.9


def test_a_layer_that_is_not_cut_does_not_move(tiny, batches) -> None:
    vit = tiny()
    before = dict(vit.linears())["blocks.2.attn.proj"].weight.detach().clone()
    step = Step(pruner=load_method("woodfisher"), thresholds={"blocks.0.mlp.fc1": 0.5})
    Plan(steps=(step,)).apply(vit, batches)
    assert torch.equal(dict(vit.linears())["blocks.2.attn.proj"].weight, before)
