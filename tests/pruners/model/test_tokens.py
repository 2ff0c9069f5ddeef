from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import global_pool_nlc

from pruners.model.tokens import patches_kept, split_by_score, weighted_pool


@given(patches=st.integers(1, 300), share=st.floats(0, 0.999))
def test_patches_kept_is_between_one_and_all(patches: int, share: float) -> None:
    kept = patches_kept(patches, share)
    assert 1 <= kept <= patches
    assert kept >= (1 - share) * patches - 1e-6
    assert kept == 1 or kept - 1 < (1 - share) * patches


def test_patches_kept_is_the_papers_ceiling() -> None:
    assert [patches_kept(196, share) for share in (0.0, 0.3, 0.5)] == [196, 138, 98]
    assert patches_kept(10, 0.3) == 7  # and not 8, though 0.7 * 10 is a little more than 7


def test_split_by_score_orders_by_score() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    keep, drop = split_by_score(scores, 2)
    assert keep.tolist() == [[1, 3]]
    assert drop.tolist() == [[2, 0]]


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax"])
def test_weights_pool_as_if_tokens_were_repeated_or_gone(kind: str) -> None:
    x, weight = torch.randn(2, 4, 3), torch.tensor([[1.0, 3.0, 0.0, 2.0]]).expand(2, -1)
    repeated = torch.cat([x[:, [0]], *[x[:, [1]]] * 3, *[x[:, [3]]] * 2], dim=1)
    expected = global_pool_nlc(repeated, kind, num_prefix_tokens=0)
    torch.testing.assert_close(weighted_pool(x, weight, kind), expected)


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax"])
def test_an_image_in_which_nothing_counts_pools_to_zeros(kind: str) -> None:
    x = torch.randn(2, 4, 3, requires_grad=True)
    weight = torch.tensor([[0.0] * 4, [1.0] * 4]).requires_grad_(True)
    pooled = weighted_pool(x, weight, kind)
    pooled.sum().backward()
    assert torch.equal(pooled[0], torch.zeros(3))
    assert (pooled[1] != 0).all()
    assert torch.isfinite(x.grad).all()
    assert kind == "max" or torch.isfinite(weight.grad).all()  # a maximum has none
