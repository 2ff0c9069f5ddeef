from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.records.journal import Journal

VALUES = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans())
LINES = st.lists(
    st.dictionaries(st.text().filter(lambda key: key != "crc32"), VALUES), min_size=1, max_size=5
)
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    assert (journal.read(), journal.read_from(0)) == ([], [])
    assert not journal.path.exists()


@FILES
@given(lines=LINES, killed=st.integers(0, 10_000), more=LINES)
def test_a_kill_at_any_byte_leaves_the_lines_before_it(
    lines: list[dict], killed: int, more: list[dict], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.unlink(missing_ok=True)
    journal, ends = Journal(path), [0]
    for line in lines:
        journal.append(line)
        ends.append(path.stat().st_size)
    content = path.read_bytes()
    at = killed % (len(content) + 1)
    path.write_bytes(content[:at])
    whole = sum(end <= at for end in ends) - 1
    assert Journal(path).read_from(0) == [*zip(lines[:whole], ends[1:], strict=False)]
    again = Journal(path)
    for line in more:
        again.append(line)
    assert again.read() == Journal(path).read() == [*lines[:whole], *more]
    assert [line for line, _ in again.read_from(ends[whole])] == more


@FILES
@given(lines=LINES, place=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_changed_byte_is_never_read_as_if_it_had_been_written(
    lines: list[dict], place: int, change: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for line in lines:
        journal.append(line)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= change
    path.write_bytes(content)
    if content.endswith(b"\n"):
        with pytest.raises(ValueError, match=r"a\.jsonl is damaged at "):
            Journal(path).read()
    elif content.count(b"\n") == len(lines) - 1:  # as if the last line were not whole
        assert Journal(path).read() == lines[:-1]


def test_what_another_writes_is_read_line_by_line(tmp_path: Path) -> None:
    writer, reader = (Journal(tmp_path / "a.jsonl") for _ in range(2))
    writer.append({"a": 1})
    ((line, place),) = reader.read_from(0)
    assert line == {"a": 1}
    with writer.path.open("ab") as file:
        file.write(b'{"a": 2')
    assert reader.read_from(place) == []
    Journal(writer.path).append({"a": 3})  # by the next process
    assert [line for line, _ in reader.read_from(place)] == [{"a": 3}]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "null", '{"a": 1}', '{"crc32": "00000000"}', "[" * 9999]
)
def test_a_line_of_another_kind_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl is damaged at .*; put back a copy of it"):
        Journal(path).read()


def test_lines_are_json_that_other_tools_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"a": "x\u2028y\x85z\nw\r", "b": float("inf")})
    assert journal.read() == [{"a": "x\u2028y\x85z\nw\r", "b": float("inf")}]
    assert json.loads(journal.path.read_text())["a"] == "x\u2028y\x85z\nw\r"
