from __future__ import annotations

import torch

from pruners import cost_of, load_method
from pruners.methods.fast_cap import SharedBlock

R, B, M = 5, 8, 30


def shared(gradients: torch.Tensor, damping: float = 0.1) -> SharedBlock:
    curvature = SharedBlock(R * B, len(gradients), B, damping)
    for part in gradients.split(7):
        curvature.add(part)
    curvature.check("a")
    return curvature


def test_the_matrix_is_the_mean_of_the_blocks() -> None:
    gradients = torch.randn(M, R * B, dtype=torch.double)
    curvature = shared(gradients)
    blocks = gradients.view(M, R, B)
    fisher = torch.einsum("krb,krc->bc", blocks, blocks) / (M * R)
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(B)
    inverse = curvature.upper.T @ curvature.upper
    torch.testing.assert_close(inverse, torch.linalg.inv(damped))
    assert torch.equal(curvature.upper, curvature.upper.triu())


def test_the_sweep_is_optimal_brain_surgeon_on_the_columns_to_the_right() -> None:
    gradients = torch.randn(M, R * B, dtype=torch.double) @ torch.randn(
        R * B, R * B, dtype=torch.double
    )
    curvature = shared(gradients)
    fisher = torch.linalg.inv(curvature.upper.T @ curvature.upper)
    w, keep = torch.randn(R, B, dtype=torch.double), torch.rand(R, B) > 0.4
    found = curvature.update(w.flatten(), keep.flatten()).view(R, B)
    for row in range(R):
        current = w[row].clone()
        for column in range(B):
            if not keep[row, column]:
                right = list(range(column, B))
                inverse = torch.linalg.inv(fisher[right][:, right])
                current[right] -= inverse[:, 0] * current[column] / inverse[0, 0]
        torch.testing.assert_close(found[row], current * keep[row])
    assert (found[~keep] == 0).all()


def test_scores_are_the_loss_when_the_left_is_fixed() -> None:
    curvature = shared(torch.randn(M, R * B, dtype=torch.double))
    fisher = torch.linalg.inv(curvature.upper.T @ curvature.upper)
    w = torch.randn(R * B, dtype=torch.double)
    scores = curvature.scores(w).view(R, B)
    for column in range(B):
        inverse = torch.linalg.inv(fisher[column:, column:])
        expected = 0.5 * w.view(R, B)[:, column] ** 2 / inverse[0, 0]
        torch.testing.assert_close(scores[:, column], expected)


def test_layers_share_one_sparsity(tiny, batches) -> None:
    vit, fast = tiny(), load_method("fast_cap", scope="layer")
    shares = fast.allocate(vit.shape(), fast.score(vit, batches), 0.6 * cost_of(vit.shape()).macs)
    assert len(set(shares.values())) == 1
