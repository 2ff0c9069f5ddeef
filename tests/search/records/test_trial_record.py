from __future__ import annotations

import dataclasses

import pytest

from tests.search.trial_records import DENSE


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DENSE.val_top1 = 90.0  # type: ignore[misc]
