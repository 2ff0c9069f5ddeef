from __future__ import annotations

import os
from pathlib import Path

import pytest

from pruners.model.files import replace_directory, replace_file


def fails(path: Path) -> None:
    """Write half of a file, or of a directory whose parent of that name is not there yet."""
    path.write_text("half")
    raise OSError("disk full")


def half_a_directory(path: Path) -> None:
    path.mkdir()
    fails(path / "a")


def whole(path: Path) -> int:
    path.mkdir()
    (path / "a").write_text("new")
    return 7


def test_a_file_is_replaced_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a"
    for content in ("old", "new"):
        assert replace_file(target, lambda path, text=content: path.write_text(text)) == 3
        assert target.read_text() == content
    with pytest.raises(OSError, match="disk full"):
        replace_file(target, fails)
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for old in (None, "stale"):
        if old is not None:
            (target / old).write_text("of the older one")
        assert replace_directory(target, whole) == 7
        assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_whose_successor_fails_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "b").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        replace_directory(target, half_a_directory)
    renames, rename = [], os.replace

    def second_fails(source: Path, to: Path) -> None:
        renames.append(source)
        if len(renames) == 2:
            raise OSError("another process is faster")
        rename(source, to)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(OSError, match="faster"):
        replace_directory(target, whole)
    assert len(renames) == 3  # the old one went aside, and came back
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "b").read_text() == "old"
