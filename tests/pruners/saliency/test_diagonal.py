from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev

from pruners.saliency.diagonal import estimate_diagonal, hutchinson, sample_mean_squares

SITE = "blocks.1.attn.proj"


def test_fisher_diagonal_is_the_mean_of_squares_not_the_square_of_the_mean(tiny, batches) -> None:
    vit = tiny()
    found = sample_mean_squares(vit, batches)[SITE]
    weight = dict(vit.linears())[SITE].weight
    singles = [
        torch.autograd.grad(F.cross_entropy(vit(x[k : k + 1]), y[k : k + 1]), weight)[0]
        for x, y in batches
        for k in range(len(y))
    ]
    torch.testing.assert_close(found, torch.stack(singles).square().mean(0), rtol=1e-4, atol=1e-8)
    assert not torch.allclose(found, torch.stack(singles).mean(0).square(), rtol=0.5)


def test_hutchinson_of_a_quadratic_shrinks_like_one_over_the_root_of_probes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.double, generator=generator)
    x[:, 3] += x[:, 5]
    weight = torch.randn(12, 1, dtype=torch.double, generator=generator).requires_grad_()
    loss = 0.5 * (x @ weight).square().mean()
    gradients = torch.autograd.grad(loss, [weight], create_graph=True)
    truth = (x.T @ x / 40).diagonal().unsqueeze(1)
    errors = []
    for probes in (25, 400):
        runs = [
            (estimate_diagonal(gradients, [weight], probes, generator)[0] - truth).square().mean()
            for _ in range(20)
        ]
        errors.append(torch.stack(runs).mean().sqrt())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.35)
    assert errors[1] < 0.1 * truth.mean()


@pytest.mark.slow
def test_hutchinson_finds_the_hessians_diagonal_of_a_layer(tiny, batches) -> None:
    vit = tiny(embed_dim=6, depth=1, num_heads=1).double()
    data = [(images.double(), labels) for images, labels in batches[:1]]
    site = "blocks.0.attn.proj"
    found = hutchinson(vit, data, probes=3000, generator=torch.Generator().manual_seed(1))[site]
    name, (images, labels) = f"vit.{site}.weight", data[0]
    vit.use_fused_attention(False)
    others = {k: v.detach() for k, v in vit.named_parameters() if k != name}
    weight = dict(vit.named_parameters())[name].detach()

    def loss(flat):
        weights = {**others, name: flat.view_as(weight)}
        return F.cross_entropy(functional_call(vit, weights, (images,)), labels)

    exact = torch.func.hessian(loss)(weight.flatten()).diagonal().view_as(weight)
    correlation = torch.corrcoef(torch.stack([found.double().flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.85
    assert (exact < 0).any()  # away from a minimum the diagonal has both signs


@pytest.mark.slow
def test_drawn_labels_give_the_gauss_newton_diagonal(tiny, batches) -> None:
    vit = tiny()
    vit.use_fused_attention(False)
    images, labels = batches[0][0][:3], batches[0][1][:3]
    name = f"vit.{SITE}.weight"
    others = {k: v.detach() for k, v in vit.named_parameters() if k != name}
    weight = dict(vit.named_parameters())[name].detach()
    jacobian = jacrev(lambda w: functional_call(vit, {**others, name: w}, (images,)))(weight)
    p = vit(images).softmax(1).detach()
    output = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    exact = torch.einsum("bcoi,bcd,bdoi->boi", jacobian, output, jacobian).mean(0)
    generator = torch.Generator().manual_seed(3)
    many = [(images, labels)] * 400
    drawn = sample_mean_squares(vit, many, draw_labels=generator)[SITE]
    true = sample_mean_squares(vit, many[:1])[SITE]
    assert (drawn - exact).norm() / exact.norm() < 0.1
    assert (true - exact).norm() / exact.norm() > 0.2


def test_no_images_are_refused(tiny) -> None:
    for measure in (
        lambda: sample_mean_squares(tiny(), []),
        lambda: hutchinson(tiny(), [], 1, torch.Generator()),
    ):
        with pytest.raises(ValueError, match="no calibration images"):
            measure()
