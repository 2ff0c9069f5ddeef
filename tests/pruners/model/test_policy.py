from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruners.model.policy import PolicyLoss, draw_keeps, kept_tokens_loss, ratio_loss
from pruners.model.tokens import Tokens

FIRST = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])  # keeps 3/4 and 4/4
SECOND = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])  # keeps 1/4 and 2/4


def policy_loss(**changes: object) -> PolicyLoss:
    values = {
        "targets": (0.5, 0.25),
        "prefix_tokens": 2,
        "patches": 4,
        "ratio_weight": 2.0,
        "token_weight": 0.5,
        "per_image": True,
    }
    return PolicyLoss(**values | changes)


def some_tokens(decisions: tuple[torch.Tensor, ...] = (FIRST, SECOND)) -> Tokens:
    return Tokens(torch.randn(2, 2 + 4 + 1, 3), decisions=decisions)  # one token behind the patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_are_drawn_with_their_probability(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.9])
    logits = torch.stack([probabilities, 1.0 - probabilities], dim=-1).log().expand(20_000, 3, 2)
    keeps = draw_keeps(logits.to(dtype))
    assert keeps.dtype == torch.float32
    assert keeps.unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(keeps.mean(dim=0), probabilities, rtol=0, atol=0.015)


def test_the_gradient_of_a_draw_is_that_of_the_soft_sample() -> None:
    logits = torch.randn(2, 5, 2, requires_grad=True)
    weights = torch.randn(2, 5)
    torch.manual_seed(3)
    keeps = draw_keeps(logits)
    (weights * keeps).sum().backward()
    torch.manual_seed(3)
    noise = -torch.empty(2, 5, 2).exponential_().log()
    soft = (logits.detach() + noise).softmax(dim=-1)[..., 0]
    assert torch.equal(keeps.detach(), (soft > 0.5).float())
    slope = weights * soft * (1.0 - soft)  # of the softmax over keep and drop
    torch.testing.assert_close(logits.grad, torch.stack([slope, -slope], dim=-1))


def test_ratio_loss_of_masks_made_by_hand() -> None:
    per_image = ratio_loss((FIRST, SECOND), (0.5, 0.25), per_image=True)
    assert per_image.item() == pytest.approx(((0.25**2 + 0.5**2) / 2 + (0 + 0.25**2) / 2) / 2)
    on_the_whole = ratio_loss((FIRST, SECOND), (0.5, 0.25), per_image=False)
    assert on_the_whole.item() == pytest.approx((0.375**2 + 0.125**2) / 2)
    assert ratio_loss((FIRST[:1],), (0.75,), per_image=True).item() == 0.0


@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=6), target=st.floats(0.0, 1.0, width=32)
)
def test_holding_every_image_is_never_cheaper_than_the_batch(counts, target) -> None:
    keep = (torch.arange(8) < torch.tensor(counts).unsqueeze(1)).float()
    each = ratio_loss((keep,), (target,), per_image=True)
    whole = ratio_loss((keep,), (target,), per_image=False)
    variance = (keep.mean(dim=1)).var(correction=0)
    assert each.item() == pytest.approx((whole + variance).item(), abs=1e-6)


def test_only_kept_tokens_are_compared() -> None:
    tokens, taught = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    loss = kept_tokens_loss(tokens, taught, FIRST)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    expected = sum((tokens[i] - taught[i]).square().sum() for i in pairs) / (7 * 3)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (tokens.grad[0, 3] == 0.0).all()
    assert (tokens.grad[1] != 0.0).all()


def test_no_gradient_flows_into_the_choice_of_compared_tokens() -> None:
    keep = FIRST.clone().requires_grad_(True)
    tokens = torch.randn(2, 4, 3, requires_grad=True)
    kept_tokens_loss(tokens, torch.randn(2, 4, 3), keep).backward()
    assert keep.grad is None


def test_nothing_kept_costs_nothing() -> None:
    tokens = torch.randn(2, 4, 3, requires_grad=True)
    loss = kept_tokens_loss(tokens, torch.randn(2, 4, 3), torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert (tokens.grad == 0.0).all()


def test_the_loss_is_the_weighted_sum_and_the_last_decision_counts() -> None:
    tokens, taught = some_tokens(), some_tokens(())
    ratio = ratio_loss((FIRST, SECOND), (0.5, 0.25), per_image=True)
    distance = kept_tokens_loss(tokens.x[:, 2:6], taught.x[:, 2:6], SECOND)
    torch.testing.assert_close(policy_loss()(tokens, taught), 2.0 * ratio + 0.5 * distance)
    weighted = policy_loss(ratio_weight=5.0, token_weight=3.0)
    torch.testing.assert_close(weighted(tokens, taught), 5.0 * ratio + 3.0 * distance)
    torch.testing.assert_close(policy_loss()(tokens, None), 2.0 * ratio)
    together = ratio_loss((FIRST, SECOND), (0.5, 0.25), per_image=False)
    torch.testing.assert_close(policy_loss(per_image=False)(tokens, None), 2.0 * together)


@pytest.mark.parametrize("place", [0, 1, 6], ids=["prefix", "second prefix", "package"])
def test_prefix_tokens_and_tokens_behind_the_patches_are_not_compared(place: int) -> None:
    tokens, taught = some_tokens(), some_tokens(())
    loss = policy_loss()(tokens, taught)
    taught.x[:, place] += 10.0
    assert torch.equal(policy_loss()(tokens, taught), loss)
    shorter = taught._replace(x=taught.x[:, :6])  # a teacher has no packages
    assert torch.equal(policy_loss()(tokens, shorter), loss)


def test_without_decisions_there_is_no_loss() -> None:
    loss = policy_loss()(some_tokens(()), some_tokens(()))
    assert loss.item() == 0.0
    assert loss.shape == ()
