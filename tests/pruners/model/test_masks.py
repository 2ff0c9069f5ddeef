from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruners.model.masks import apply_masks, keep_highest, nonzero_mask


@given(values=st.lists(st.integers(-5, 5), min_size=6, max_size=6), kept=st.integers(0, 6))
def test_exactly_the_highest_are_kept_even_with_ties(values: list[int], kept: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32).view(2, 3)
    mask = keep_highest(scores, kept)
    assert int(mask.sum()) == kept
    if 0 < kept < 6:
        assert scores[mask].min() >= scores[~mask].max()


def test_masks_zero_in_place() -> None:
    layer = torch.nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    before = layer.weight.detach().clone()
    apply_masks({"a": layer}, {"a": mask})
    assert torch.equal(layer.weight, before * mask)


def test_the_mask_of_a_stored_weight_is_recovered() -> None:
    weight = torch.tensor([[0.0, -2.0, 0.0], [1.0, 0.0, 3.0]])
    assert torch.equal(nonzero_mask(weight, 3, "a"), weight != 0)
    assert int(nonzero_mask(weight, 4, "a").sum()) == 4  # a kept weight may happen to be zero
    with pytest.raises(ValueError, match="a has 3 weights that are not zero; its shape says 2"):
        nonzero_mask(weight, 2, "a")
