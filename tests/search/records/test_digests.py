from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from search.records.digests import file_digest, json_digest, tensors_digest


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
