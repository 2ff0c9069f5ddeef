from __future__ import annotations

import torch

from pruners import Plan, Step, load_method
from pruners.methods.mfac import MatrixFree
from pruners.methods.woodfisher import SimultaneousOBS


def test_it_is_woodfisher_where_the_blocks_are_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    w, gradients = torch.randn(36, generator=generator), torch.randn(20, 36, generator=generator)
    keep = torch.rand(36, generator=generator) > 0.4
    both = (MatrixFree(36, 20, 12, 0.05), SimultaneousOBS(36, 20, 12, 0.05))
    for curvature in both:
        curvature.add(gradients)
        curvature.check("a")
    first, second = both
    torch.testing.assert_close(first.scores(w), second.scores(w), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first.update(w, keep), second.update(w, keep), rtol=1e-3, atol=1e-5)


def test_blocks_may_be_larger_than_the_number_of_gradients(tiny, batches) -> None:
    vit = tiny()
    mfac = load_method("mfac", block=1000)
    Plan(steps=(Step(pruner=mfac, thresholds={"blocks.1.mlp.fc2": 0.5}),)).apply(vit, batches)
    weight = dict(vit.linears())["blocks.1.mlp.fc2"].weight
    assert int((weight == 0).sum()) == weight.numel() // 2
