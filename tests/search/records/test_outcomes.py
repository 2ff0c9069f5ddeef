from __future__ import annotations

from search.records.outcomes import Reason, counts, reasons
from tests.search.trial_records import DENSE, record

RECORDS = [
    DENSE,
    record("0001", 0.5, 70.0),
    record("0002", 0.5, None, "failed", reason="out of memory"),
    record("0003", 0.5, 30.0, "stopped"),
    record("0004", 0.5, None, "failed", reason="loss is not finite"),
    record("0005", 0.5, 30.0, "stopped"),
    record("0006", 0.5, None, "failed", reason="loss is not finite"),
    record("0007", 0.5, 30.0, "running"),
]


def test_ends_are_counted() -> None:
    assert counts(RECORDS) == "1 finished, 2 stopped, 3 failed, 1 running"
    assert counts(RECORDS[:2]) == "1 finished"


def test_failures_come_first_and_the_commonest_first() -> None:
    assert reasons(RECORDS) == [
        Reason(end="failed", why="loss is not finite", trials=("0004", "0006")),
        Reason(end="failed", why="out of memory", trials=("0002",)),
        Reason(
            end="stopped early",
            why="others of similar cost were better",
            trials=("0003", "0005"),
        ),
    ]
    assert reasons(RECORDS[:2]) == []
