from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.methods.cap import GreedyOBS, compensate, eliminate
from pruners.methods.woodfisher import SimultaneousOBS
from search.data.decode import ImageSpec
from search.data.images import open_images

B = 12
SAMPLE = Path(__file__).parents[3] / "search" / "sample"


def problems(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, B] and correlated Fisher matrices [R, B, B]."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(count, 8, B, dtype=torch.double, generator=generator)
    g = g + 1.5 * torch.randn(count, 8, 1, dtype=torch.double, generator=generator)
    fisher = g.transpose(1, 2) @ g / 8 + 0.02 * torch.eye(B, dtype=torch.double)
    return torch.randn(count, B, dtype=torch.double, generator=generator), fisher


def quadratic(w: torch.Tensor, fisher: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    d = (moved - w).unsqueeze(2)
    return 0.5 * (d.transpose(1, 2) @ fisher @ d).flatten()


def greedy_by_hand(w: torch.Tensor, fisher: torch.Tensor) -> tuple[list[int], list[float]]:
    """One block, with a fresh inverse of the remaining sub-matrix at every step."""
    left, losses, current, total = list(range(len(w))), [], w.clone(), 0.0
    order: list[int] = []
    while left:
        inverse = torch.linalg.inv(fisher[left][:, left])
        saliency = 0.5 * current[left] ** 2 / inverse.diagonal()
        best = int(saliency.argmin())
        total += float(saliency[best])
        current[left] -= inverse[:, best] * current[left[best]] / inverse[best, best]
        order.append(left.pop(best))
        losses.append(total)
    return order, losses


def keep_first(scores: torch.Tensor, kept: int) -> torch.Tensor:
    return scores >= scores.sort(dim=1, descending=True).values[:, kept - 1 : kept]


def test_elimination_is_greedy_with_a_fresh_inverse_each_time() -> None:
    w, fisher = problems(6)
    scores = eliminate(w, torch.linalg.inv(fisher))
    for block in range(6):
        order, losses = greedy_by_hand(w[block], fisher[block])
        torch.testing.assert_close(scores[block][order], torch.tensor(losses), check_dtype=False)
        assert losses == sorted(losses)


@pytest.mark.parametrize("removed", [1, 5, 11])
def test_the_score_is_the_loss_and_the_update_its_minimum(removed: int) -> None:
    w, fisher = problems(20, seed=removed)
    inverse = torch.linalg.inv(fisher)
    scores = eliminate(w, inverse)
    keep = keep_first(scores, B - removed)
    moved = compensate(w, inverse, keep)
    assert (moved[~keep] == 0).all()
    losses = quadratic(w, fisher, moved)
    torch.testing.assert_close(losses, scores.masked_fill(keep, 0.0).amax(dim=1))
    for block in range(20):
        gone, stays = ~keep[block], keep[block]
        closed = (
            0.5 * w[block][gone] @ torch.linalg.inv(inverse[block][gone][:, gone]) @ w[block][gone]
        )
        torch.testing.assert_close(losses[block], closed)
        f = fisher[block]
        expected = w[block][stays] + torch.linalg.solve(
            f[stays][:, stays], f[stays][:, gone] @ w[block][gone]
        )
        torch.testing.assert_close(moved[block][stays], expected)


def test_never_worse_than_woodfisher_for_the_same_mask() -> None:
    w, fisher = problems(300)
    inverse = torch.linalg.inv(fisher)
    keep = keep_first(eliminate(w, inverse), 6)
    simultaneous = SimultaneousOBS(300 * B, 1, B, 1.0)
    simultaneous.inverse = inverse
    single = simultaneous.update(w.flatten(), keep.flatten()).view(-1, B)
    losses = {
        "cap": quadratic(w, fisher, compensate(w, inverse, keep)),
        "woodfisher": quadratic(w, fisher, single),
        "none": quadratic(w, fisher, w * keep),
    }
    assert (losses["cap"] <= losses["woodfisher"] + 1e-12).all()
    assert (losses["cap"] <= losses["none"] + 1e-12).all()
    assert losses["cap"].mean() < 0.5 * losses["woodfisher"].mean()


def test_greedy_selection_beats_the_other_saliencies_on_correlated_problems() -> None:
    w, fisher = problems(300, seed=1)
    inverse = torch.linalg.inv(fisher)
    diagonal = {"obd": fisher.diagonal(dim1=1, dim2=2), "magnitude": torch.ones_like(w)}
    cap = quadratic(w, fisher, compensate(w, inverse, keep_first(eliminate(w, inverse), 6)))
    for d in diagonal.values():
        keep = keep_first(w**2 * d, 6)
        assert cap.mean() < 0.6 * quadratic(w, fisher, w * keep).mean()


def test_one_removed_weight_is_woodfisher_exactly() -> None:
    w, fisher = problems(10)
    inverse = torch.linalg.inv(fisher)
    simultaneous = SimultaneousOBS(10 * B, 1, B, 1.0)
    simultaneous.inverse = inverse
    scores = simultaneous.scores(w.flatten()).view(-1, B)
    keep = keep_first(scores, B - 1)
    assert torch.equal(keep, keep_first(eliminate(w, inverse), B - 1))
    expected = simultaneous.update(w.flatten(), keep.flatten()).view(-1, B)
    torch.testing.assert_close(compensate(w, inverse, keep), expected)
    # And that is the constrained minimum, at most what removing it without an update costs.
    assert (quadratic(w, fisher, expected) <= quadratic(w, fisher, w * keep) + 1e-12).all()


def test_with_a_diagonal_fisher_matrix_the_order_is_obds_and_nothing_moves() -> None:
    w, _ = problems(5)
    diagonal = torch.rand(5, B, dtype=torch.double) + 0.1
    inverse = torch.diag_embed(1 / diagonal)
    scores = eliminate(w, inverse)
    assert torch.equal(scores.argsort(dim=1), (0.5 * w**2 * diagonal).argsort(dim=1))
    keep = keep_first(scores, 7)
    torch.testing.assert_close(compensate(w, inverse, keep), w * keep)
    # Of a diagonal matrix the loss is the sum of what each weight costs.
    expected = (0.5 * w**2 * diagonal * ~keep).sum(1)
    torch.testing.assert_close(scores.masked_fill(keep, 0.0).amax(1), expected)


def test_of_perfect_twins_one_stays_and_takes_over() -> None:
    # Two inputs that are always equal, and a third, moderately useful one: two of three go.
    x = torch.randn(500, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    features = torch.stack([x[:, 0], x[:, 0], 0.8 * x[:, 1]], dim=1)
    fisher = (features.T @ features / 500 + 1e-6 * torch.eye(3, dtype=torch.double)).unsqueeze(0)
    w = torch.tensor([[0.9, 1.1, 1.0]], dtype=torch.double)
    inverse = torch.linalg.inv(fisher)
    singles = (0.5 * w**2 / inverse.diagonal(dim1=1, dim2=2))[0]
    assert singles[:2].max() < 1e-3 < singles[2]  # WoodFisher would take both twins
    scores = eliminate(w, inverse)[0]
    assert scores.argsort().tolist()[:2] in ([0, 2], [1, 2])
    keep = scores == scores.max()
    moved = compensate(w, inverse, keep.unsqueeze(0))[0]
    assert moved[keep].item() == pytest.approx(2.0, rel=0.05)


def test_zero_weights_leave_first_at_no_cost() -> None:
    w, fisher = problems(4)
    w[:, [2, 7]] = 0.0
    scores = eliminate(w, torch.linalg.inv(fisher))
    assert (scores[:, [2, 7]] == 0).all()
    assert (scores.sort(dim=1).values[:, 2] > 0).all()


def test_the_inverse_is_not_changed_by_scoring() -> None:
    # The public code eliminates in place, so that only its first pruning step works.
    curvature = GreedyOBS(4 * B, 20, B, 0.1)
    curvature.add(torch.randn(20, 4 * B))
    before, w = curvature.matrix.clone(), torch.randn(4 * B)
    first = curvature.scores(w)
    assert torch.equal(curvature.matrix, before)
    assert torch.equal(curvature.scores(w), first)


@pytest.mark.parametrize("rounds", [1, 2])
def test_sparsity_is_exact_and_zeros_stay_over_rounds(rounds: int, tiny, batches) -> None:
    vit = tiny()
    cap = load_method("cap", rounds=rounds, block=24)
    sites = list(cap.sites(vit.shape()))
    assert len(sites) == 4 * 3
    assert {s.split(".", 2)[2] for s in sites} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    Plan(steps=(Step(pruner=cap, thresholds=dict.fromkeys(sites, 0.25)),)).apply(vit, batches)
    first = {site: layer.weight == 0 for site, layer in vit.linears()}
    Plan(steps=(Step(pruner=cap, thresholds=dict.fromkeys(sites, 0.5)),)).apply(vit, batches)
    for site, layer in vit.linears():
        zeros = layer.weight == 0
        assert int(zeros.sum()) == layer.weight.numel() // 2
        assert zeros[first[site]].all()


@pytest.fixture(scope="module")
def calibration() -> list[tuple[torch.Tensor, torch.Tensor]]:
    spec = ImageSpec(
        size=(32, 32), channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    )
    images = open_images(str(SAMPLE / "train.parquet"), spec)
    return list(images.batches(64, seed=1, augment=False))[:2]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_on_a_trained_vit_cap_loses_least_and_predicts_it(
    calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[tuple[str, float], float] = {}
    predicted: dict[float, float] = {}
    for name in ("magnitude", "woodfisher", "cap"):
        method = load_method(name, **({} if name == "magnitude" else {"block": 32}))
        if name != "magnitude":  # the same dense model is scored and cut: its curvature is known
            known = list(method._curvatures(_trained(), calibration))
            monkeypatch.setattr(type(method), "_curvatures", lambda *_, known=known: iter(known))
        scores = method.score(_trained(), calibration)
        for sparsity in (0.5, 0.7):
            vit = _trained()
            linear = sum(r * c * t for _, r, c, t in vit.shape().linears())
            budget = cost_of(vit.shape()).effective_macs - sparsity * linear
            shares = method.allocate(vit.shape(), scores, budget)
            Plan(steps=(Step(pruner=method, thresholds=shares),)).apply(vit, calibration)
            losses[name, sparsity] = _loss(vit, calibration)
            if name == "cap":
                predicted[sparsity] = sum(
                    _block_losses(score, shares[site]) for site, score in scores.items()
                )
    for sparsity in (0.5, 0.7):
        assert losses["cap", sparsity] < losses["magnitude", sparsity]
        assert losses["cap", sparsity] < losses["woodfisher", sparsity]
    assert losses["cap", 0.7] > losses["cap", 0.5]
    assert predicted[0.7] > predicted[0.5] > 0


def _trained() -> PrunableViT:
    return PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()


def _block_losses(scores: torch.Tensor, share: float) -> float:
    """Sum over blocks of the loss that the greedy elimination predicts for that share."""
    ranked = scores.flatten().sort().values
    removed = scores <= ranked[max(0, int(share * scores.numel() + 0.5) - 1)]
    return float((scores * removed).flatten().view(-1, 32).amax(1).sum())


@torch.no_grad()
def _loss(vit: PrunableViT, batches) -> float:
    vit.use_fused_attention(False)
    return sum(torch.nn.functional.cross_entropy(vit(x), y).item() for x, y in batches) / len(
        batches
    )
