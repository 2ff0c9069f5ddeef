from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.records.digests import (
    DAMAGE,
    file_digest,
    json_digest,
    read_sealed,
    sealed,
    tensors_digest,
)


def test_a_files_digest_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert file_digest(tmp_path / "a") == known


def test_settings_are_the_same_in_any_order() -> None:
    one = json_digest({"a": 1, "b": [2, None]})
    assert one == json_digest({"b": [2, None], "a": 1})
    assert one != json_digest({"a": 1, "b": [None, 2]})
    assert one == hashlib.sha256(b'{"a": 1, "b": [2, null]}').hexdigest()


def test_tensors_differ_by_name_value_shape_and_type() -> None:
    t = torch.arange(4.0).view(2, 2)
    others = [{"b": t}, {"a": t + 1}, {"a": t.flatten()}, {"a": t.to(torch.bfloat16)}, {"a": t.T}]
    digests = {tensors_digest(tensors) for tensors in ({"a": t}, *others)}
    assert len(digests) == 6
    assert tensors_digest({"a": t.T.contiguous().T}) == tensors_digest({"a": t})


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
