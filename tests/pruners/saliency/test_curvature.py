from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruners import load_method
from pruners.methods.mfac import MatrixFree
from pruners.methods.woodfisher import SimultaneousOBS
from pruners.saliency.curvature import block_size, gradient_chunks, layer_groups, update_inverse
from pruners.saliency.gradients import sample_gradients

M, R, B, DAMPING = 30, 4, 12, 0.05


def gradients(seed: int = 0, dtype: torch.dtype = torch.double) -> torch.Tensor:
    """Correlated, of different sizes: [M, R * B]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(R * B, R * B, dtype=dtype, generator=generator)
    return (
        torch.randn(M, R * B, dtype=dtype, generator=generator)
        @ mix
        * torch.logspace(-1, 1, R * B, dtype=dtype)
    )


def fisher(g: torch.Tensor, damping: float) -> torch.Tensor:
    """[R, B, B], written out."""
    blocks = g.view(len(g), R, B)
    outer = torch.einsum("krb,krc->rbc", blocks, blocks) / len(g)
    return outer + damping * torch.eye(B, dtype=g.dtype)


@pytest.mark.parametrize("chunk", [1, 7, M])
def test_the_recursion_is_the_inverse_whatever_the_chunks_and_order(chunk: int) -> None:
    g = gradients()[torch.randperm(M)]
    inverse = torch.eye(B, dtype=torch.double).repeat(R, 1, 1) / DAMPING
    for part in g.split(chunk):
        inverse = update_inverse(inverse, part, M)
    torch.testing.assert_close(inverse, torch.linalg.inv(fisher(g, DAMPING)), rtol=1e-8, atol=1e-10)


def test_one_gradient_at_a_time_is_sherman_morrison() -> None:
    g = gradients()
    inverse = torch.eye(B, dtype=torch.double).repeat(R, 1, 1) / DAMPING
    for k in range(M):
        v = torch.einsum("rbc,rc->rb", inverse, g[k].view(R, B))
        q = M + (v * g[k].view(R, B)).sum(1)
        expected = inverse - v.unsqueeze(2) * v.unsqueeze(1) / q.view(-1, 1, 1)
        inverse = update_inverse(inverse, g[k : k + 1], M)
        torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-12)


def test_mfac_products_and_diagonal_are_those_of_the_inverse() -> None:
    g = gradients()
    free = MatrixFree(R * B, M, B, DAMPING)
    for part in g.split(11):
        free.add(part)
    free.check("a")
    exact = torch.linalg.inv(fisher(g, DAMPING * float(g.square().mean())))
    x = torch.randn(R * B, dtype=torch.double)
    product = torch.einsum("rbc,rc->rb", exact, x.view(R, B)).flatten()
    torch.testing.assert_close(free.product(x), product, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        free.diagonal(), exact.diagonal(dim1=1, dim2=2).flatten(), rtol=1e-7, atol=1e-9
    )


def test_mfac_is_the_papers_recursion() -> None:
    g, scale = gradients()[:, :B], DAMPING
    free = MatrixFree(B, M, B, DAMPING / float(g.square().mean()))
    free.add(g)
    free.check("a")
    v: list[torch.Tensor] = []
    q: list[torch.Tensor] = []
    for k in range(M):
        step = g[k] / scale - sum(
            (vj * (vj @ g[k]) / qj for vj, qj in zip(v, q, strict=True)), torch.zeros(B)
        )
        v.append(step)
        q.append(M + g[k] @ step)
    x = torch.randn(B, dtype=torch.double)
    product = x / scale - sum(vj * (vj @ x) / qj for vj, qj in zip(v, q, strict=True))
    torch.testing.assert_close(free.product(x), product, rtol=1e-6, atol=1e-8)


def test_masked_weights_decouple(tiny, batches) -> None:
    vit = tiny()
    site = "blocks.0.mlp.fc1"
    magnitude = load_method("magnitude")
    magnitude.cut(vit, magnitude.score(vit, []), {site: 0.5})
    (chunk,) = gradient_chunks(vit, batches[:1], [site], 1)
    gone = ~vit.masks[site].flatten()
    assert (chunk[site][:, gone] == 0).all()
    assert (chunk[site][:, ~gone] != 0).any()
    curvature = SimultaneousOBS(gone.numel(), 6, 24, 1e-2)
    curvature.add(chunk[site])
    matrix = curvature.matrix
    block = int(gone.view(-1, 24).any(1).nonzero()[0])
    where = int(gone.view(-1, 24)[block].nonzero()[0])
    row = matrix[block, where].clone()
    row[where] = 0.0
    assert (row == 0).all()


def test_gradients_are_means_of_groups_of_images(tiny, batches) -> None:
    vit = tiny()
    site = "blocks.2.attn.qkv"
    found = torch.cat([c[site] for c in gradient_chunks(vit, batches, [site], 4)])
    assert len(found) == 3  # 6 images a batch: one whole group each, the rest is left out
    images, labels = batches[1]
    single = sample_gradients(vit, images, labels, [site])[site].flatten(1)
    torch.testing.assert_close(found[1], single[:4].mean(0), rtol=1e-4, atol=1e-6)


@given(weights=st.integers(1, 3000), wanted=st.integers(1, 200))
def test_blocks_divide_the_layer(weights: int, wanted: int) -> None:
    size = block_size(weights, wanted)
    assert weights % size == 0
    assert size >= min(wanted, weights)
    assert not any(weights % s == 0 for s in range(min(wanted, weights), size))


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20), limit=st.integers(1, 300))
def test_groups_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    groups = layer_groups(named, 2, limit)
    assert [site for group in groups for site in group] == list(named)
    for group in groups:
        assert len(group) == 1 or sum(2 * named[site] for site in group) <= limit


def test_a_memory_limit_changes_nothing_but_the_passes(tiny, batches) -> None:
    vit = tiny()
    whole = load_method("cap").score(vit, batches)
    few = load_method("cap", memory_gb=1e-6).score(vit, batches)
    for site, score in whole.items():
        torch.testing.assert_close(few[site], score, rtol=1e-3, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["woodfisher", "cap", "mfac"])
def test_a_matrix_that_cannot_be_inverted_is_named_with_what_mends_it(
    method: str, tiny, batches
) -> None:
    pruner, vit, many = load_method(method, damping=1e-14, block=96), tiny(), batches * 40
    with pytest.raises(
        ValueError, match=r"Fisher block \d+ of blocks\.\d\..*give damping = 0\.001 or more"
    ):
        pruner.score(vit, many)
    load_method(method, damping=1e-3, block=96).score(tiny(), batches)


@pytest.mark.parametrize("method", ["fisher", "woodfisher", "mfac", "cap", "fast_cap"])
def test_a_layer_without_gradient_is_cut_first(method: str, tiny, batches) -> None:
    vit = tiny(init_values=0.5)
    with torch.no_grad():
        vit.blocks[1].ls2.gamma.zero_()
    scores = load_method(method).score(vit, batches)
    dead = max(float(scores[f"blocks.1.mlp.{layer}"].max()) for layer in ("fc1", "fc2"))
    alive = float(scores["blocks.0.mlp.fc1"].median())
    assert 0.0 <= dead < 1e-3 * alive


def test_too_few_images_are_refused(tiny, batches) -> None:
    with pytest.raises(ValueError, match="fewer images than gradient_batch = 7"):
        load_method("cap", gradient_batch=7).score(tiny(), batches)


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("block", "a whole number, at least 1"),
        ("damping", "a number, more than 0"),
        ("gradient_batch", "a whole number, at least 1"),
        ("memory_gb", "a number, more than 0"),
    ],
)
def test_options_are_checked(option: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} of cap is 0; give {right}"):
        load_method("cap", **{option: 0})


def test_doubling_the_gradients_quadruples_the_scores() -> None:
    w = torch.randn(R * B, dtype=torch.double)
    for factory in (SimultaneousOBS, MatrixFree):
        scores = []
        for factor in (1.0, 2.0):
            curvature = factory(R * B, M, B, DAMPING)
            curvature.add((factor * gradients()).float())
            curvature.check("a")
            scores.append(curvature.scores(w.float()))
        torch.testing.assert_close(scores[1], 4 * scores[0], rtol=1e-2, atol=0)
