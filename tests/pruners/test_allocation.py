from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pruners.allocation import smallest


@given(limit=st.integers(0, 300), largest=st.integers(0, 300))
def test_smallest(limit: int, largest: int) -> None:
    found = smallest(largest, lambda n: n >= limit)
    assert found == (limit if limit <= largest else None)
