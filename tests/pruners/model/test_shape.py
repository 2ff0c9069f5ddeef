from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruners import ViTShape
from pruners.model.shape import units_kept


@given(units=st.integers(1, 5000), share=st.floats(0, 1))
def test_units_kept(units: int, share: float) -> None:
    kept = units_kept(units, share)
    assert 0 <= kept <= units
    assert (kept == 0) == (share == 1.0)
    if 0 < kept < units and kept > 1:
        assert abs(units - kept - share * units) <= 0.5 + 1e-9


@given(units=st.integers(2, 5000), data=st.data())
def test_the_share_of_whole_units_is_exact(units: int, data) -> None:
    cut = data.draw(st.integers(0, units - 1))
    assert units_kept(units, cut / units) == units - cut


def test_json_round_trip(tiny) -> None:
    shape = tiny(reg_tokens=1, qk_norm=True).shape()
    assert ViTShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_missing_and_unknown_fields_are_named(tiny) -> None:
    values = tiny().shape().to_json()
    values["widht"] = values.pop("dim")
    with pytest.raises(
        ValueError, match=r"missing fields \['dim'\] and unknown fields \['widht'\]"
    ):
        ViTShape.from_json(values)
