from __future__ import annotations

import pytest
import torch

from pruners.model import attention
from pruners.model.attention import softmax_with_policy


def test_a_policy_of_ones_is_a_plain_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "POLICY_EPS", 0.0)
    logits = torch.randn(2, 3, 5, 5)
    weights = softmax_with_policy(logits, torch.ones(2, 5))
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_dropped_keys_are_seen_by_themselves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "POLICY_EPS", 0.0)
    logits = torch.randn(1, 2, 4, 4)
    weights = softmax_with_policy(logits, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    kept = logits[..., [0, 2]][..., [0, 2], :].softmax(-1)
    torch.testing.assert_close(weights[..., [0, 2]][..., [0, 2], :], kept)
    assert weights[0, :, 0, 1].abs().max() == weights[0, :, 2, 3].abs().max() == 0.0
    assert (weights[0, :, 1, 1] > 0.0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_and_empty_policies_stay_finite(dtype: torch.dtype) -> None:
    logits = (torch.randn(1, 2, 4, 4) * 1e4).to(dtype).requires_grad_(True)
    policy = torch.zeros(1, 4, requires_grad=True)
    weights = softmax_with_policy(logits, policy)
    weights.square().sum().backward()
    assert weights.dtype == torch.float32
    for values in (weights, logits.grad, policy.grad):
        assert torch.isfinite(values).all()


def test_the_gradient_of_the_policy_equals_finite_differences() -> None:
    logits = torch.randn(1, 2, 4, 4)
    policy = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    weight = torch.randn(1, 2, 4, 4)
    leaf = policy.clone().requires_grad_(True)
    (softmax_with_policy(logits, leaf) * weight).sum().backward()
    for token in range(4):
        change = torch.zeros(1, 4)
        change[0, token] = 1e-2
        up, down = (
            (softmax_with_policy(logits, policy + sign * change).double() * weight).sum()
            for sign in (1, -1)
        )
        assert leaf.grad[0, token].item() == pytest.approx(((up - down) / 2e-2).item(), rel=0.02)
    assert (leaf.grad[0, [1, 3]] != 0).all()  # also where the policy is 0
