from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.records.digests import DAMAGE, read_sealed, sealed

VALUES = {"loss": 0.1, "digests": {"a": "1"}, "results": [1, None]}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(sealed(VALUES))
    assert read_sealed(tmp_path / "a.json") == VALUES


def test_any_changed_value_is_seen(tmp_path: Path) -> None:
    for key in VALUES:
        changed = {**json.loads(sealed(VALUES)), key: "other"}
        (tmp_path / "a.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"a\.json is not what was written"):
            read_sealed(tmp_path / "a.json")


def test_an_absent_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DAMAGE):
        read_sealed(tmp_path / "a.json")


@given(length=st.integers(0, len(sealed(VALUES)) - 1))
def test_a_torn_file_is_damage(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.json"
    path.write_text(sealed(VALUES)[:length])
    with pytest.raises(DAMAGE):
        read_sealed(path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"digest"', "{}", "[" * 100_000])
def test_what_is_no_such_file_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DAMAGE):
        read_sealed(tmp_path / "a.json")
