from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.journal import Journal

LINES = st.lists(
    st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.floats(allow_nan=False))),
    min_size=1,
    max_size=5,
)


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    assert (journal.read(), journal.size) == ([], 0)
    journal.cut(0)
    assert not journal.path.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(lines=LINES, killed=st.integers(0, 10_000), more=LINES)
def test_a_kill_at_any_byte_leaves_the_lines_before_it(
    lines: list[dict], killed: int, more: list[dict], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.unlink(missing_ok=True)
    journal, ends = Journal(path), [0]
    for line in lines:
        journal.append(line)
        ends.append(journal.size)
    assert path.stat().st_size == journal.size
    content = path.read_bytes()
    at = killed % (len(content) + 1)
    path.write_bytes(content[:at])
    whole = sum(end <= at for end in ends) - 1
    again = Journal(path)
    assert (again.read(), again.size) == (lines[:whole], ends[whole])
    again = Journal(path)
    for line in more:
        again.append(line)
    assert again.read() == Journal(path).read() == [*lines[:whole], *more]


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"a": 1})
    size = journal.size
    journal.append({"a": 2})
    again = Journal(journal.path)
    again.cut(size)
    again.append({"a": 3})
    assert Journal(journal.path).read() == [{"a": 1}, {"a": 3}]
    with pytest.raises(ValueError, match=r"a\.jsonl has \d+ bytes; 1000 are needed"):
        again.cut(1000)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"a": "x\u2028y\x85z\nw\r"})
    assert journal.read() == [{"a": "x\u2028y\x85z\nw\r"}]
