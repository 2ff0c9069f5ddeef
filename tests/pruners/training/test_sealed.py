from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from pruners.training.sealed import load_sealed, save_sealed

CPU = torch.device("cpu")


def test_a_state_comes_back(tmp_path: Path) -> None:
    save_sealed({"a": torch.arange(3), "b": {"c": [1.5, "x"]}}, tmp_path / "a")
    state = load_sealed(tmp_path / "a", CPU)
    assert state["a"].tolist() == [0, 1, 2]
    assert state["b"] == {"c": [1.5, "x"]}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    save_sealed({"a": torch.arange(300)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"a\.part is damaged; remove it"):
        load_sealed(path, CPU)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_is_unpickled_even_under_a_right_digest(plain: bool, tmp_path: Path) -> None:
    path, evil = tmp_path / "a.part", tmp_path / "evil"
    stream = io.BytesIO()
    if plain:
        pickle.dump(Evil(evil), stream, protocol=2)
    else:
        torch.save({"a": Evil(evil)}, stream)
    content = stream.getvalue()
    path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(ValueError, match=r"a\.part is no state; remove it"):
        load_sealed(path, CPU)
    assert not evil.exists()
