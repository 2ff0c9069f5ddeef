from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruners import cost_of, load_method
from pruners.families.allocation import rank_globally, smallest


@given(limit=st.integers(0, 300), largest=st.integers(0, 300))
def test_smallest(limit: int, largest: int) -> None:
    found = smallest(largest, lambda n: n >= limit)
    assert found == (limit if limit <= largest else None)


def test_a_ranking_stops_at_the_floors(tiny) -> None:
    shape, method = tiny().shape(), load_method("grouped", units=("neuron",))
    scores = {site: torch.rand(96).sort().values for site in method.sites(shape)}
    first, second, third = scores
    scores[second] = scores[second] * 1e-3  # would go first, and as a whole but for one neuron
    floors = {first: 90, second: 20, third: 200}

    def shrunk(budget: float, floors: dict[str, int] | None = None) -> list[int]:
        macs = budget * cost_of(shape).effective_macs
        shares = rank_globally(shape, scores, lambda s: method.shrink(shape, s), macs, floors)
        assert set(shares) == set(scores)
        left = method.shrink(shape, shares)
        assert cost_of(left).effective_macs <= macs
        return [block.hidden for block in left.blocks]

    assert shrunk(0.8)[1] == 1
    assert shrunk(0.9, {first: 1}) == shrunk(0.9)
    assert shrunk(0.9, {second: 96})[1] == 96
    hidden = shrunk(0.85, floors)
    assert 90 <= hidden[0] <= 96
    assert hidden[1:] == [20, 96]
    with pytest.raises(ValueError, match="out of reach"):
        shrunk(0.8, floors)
    with pytest.raises(ValueError, match="nothing is left to cut"):
        shrunk(0.9, dict.fromkeys(scores, 96))
