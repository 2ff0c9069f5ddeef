from __future__ import annotations

import dataclasses
import io

import pytest

from search.records.front import build_front
from search.report.progress import Progress, duration, front_line, front_table, trial_line
from tests.search.trial_records import DENSE, record


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(io.StringIO(), trials=12, epochs=2, clock=clock)


def lines(progress: Progress) -> list[str]:
    return progress.stream.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_line_for_each_trial_with_count_and_time_left(progress: Progress, clock: Clock) -> None:
    progress.started(DENSE)
    clock.now += 10
    progress.ended_with(DENSE, build_front([DENSE], "gmacs"))
    clock.now += 20
    member = record("0001", 0.5, 70.0)
    progress.ended_with(member, build_front([DENSE, member], "effective_gmacs"))
    shown = lines(progress)
    assert (
        shown[0]
        == "[ 1/12] 0000 grouped 1.00x: val 80.0 %, 2 GMACs (1 effective), 4 s  about 1:50 min left"
    )
    assert shown[1].startswith("[ 2/12] 0001")
    assert shown[1].endswith("about 2:30 min left")
    assert shown[2] == "        front: 0.50x 70.0 %; hypervolume 0.3500"
    assert all("\x1b" not in line and "\r" not in line for line in shown)


def test_a_trial_that_does_not_join_the_front_prints_no_front(progress: Progress) -> None:
    best, worse = record("0001", 0.5, 70.0), record("0002", 0.6, 60.0)
    progress.ended_with(worse, build_front([DENSE, best, worse], "effective_gmacs"))
    assert len(lines(progress)) == 1


def test_silence_is_broken_after_a_while(progress: Progress, clock: Clock) -> None:
    running = dataclasses.replace(
        record("0001", 0.5, None, "running"), history=[{"epoch": 0}], epochs=1
    )
    progress.started(running)
    progress.started(dataclasses.replace(running, trial="0002", name="0002 evit 0.60x", history=[]))
    clock.now += 29
    progress.tick()
    assert lines(progress) == []
    clock.now += 2
    progress.tick()
    progress.tick()
    assert lines(progress) == [
        "[ 0/12] running: 0001 grouped 0.50x (epoch 1 of 2), 0002 evit 0.60x (starting)"
    ]


def test_a_continued_sweep_counts_what_was_done_before(progress: Progress, clock: Clock) -> None:
    progress.restored(2)
    clock.now += 10
    progress.ended_with(record("0002", 0.5, 70.0), None)
    assert lines(progress)[0].startswith("[ 3/12]")
    assert lines(progress)[0].endswith("about 1:30 min left")  # nine more at ten seconds each


def test_what_failed_says_why() -> None:
    failed = record("0003", 0.5, None, "failed", reason="epoch 1: loss is nan")
    assert trial_line(failed) == "0003 grouped 0.50x: failed, epoch 1: loss is nan"


def test_the_table_shows_every_column_and_whole_plans() -> None:
    long = (
        "grouped: heads -13 % (7 to 19), neurons -13 % (7 to 19); evit: tokens -17 % (1 to 34); "
        "magnitude: weights -18 %"
    )
    front = build_front(
        [
            dataclasses.replace(DENSE, test_top1=81.0),
            record("0002", 0.4, 60.0, test_top1=61.25, plan_line=long),
            record("0001", 0.8, 70.0),
        ],
        "effective_gmacs",
    )
    stream = io.StringIO()
    front_table(front, stream)
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= 100
    rows = [line.split() for line in shown.splitlines()]
    assert ["0002", "60.0", "61.2", "2", "0.8", "0.4", "2.50x", "1,000", "0.50", "12"] in rows
    assert ["0001", "70.0", "-", "2", "1.6", "0.8", "1.25x", "1,000", "0.50", "12"] in rows
    assert ["dense", "80.0", "81.0", "2", "2", "1", "1.00x", "1,000", "0.50", "12"] in rows
    assert long in " ".join(shown.split())


def test_confirmed_members_show_mean_and_spread_and_what_may_be_luck() -> None:
    members = [
        record("0001", 0.5, 70.0),
        record("0002", 0.75, 70.4),
        *(
            record(f"000{3 + i}", 0.5, top1, origin="confirm", of="0001")
            for i, top1 in enumerate((68.0, 69.0))
        ),
        *(
            record(f"000{5 + i}", 0.75, top1, origin="confirm", of="0002")
            for i, top1 in enumerate((69.0, 69.4))
        ),
        record("0009", 0.25, 69.9),  # never confirmed
    ]
    front = build_front([DENSE, *members], "effective_gmacs")
    stream = io.StringIO()
    front_table(front, stream)
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert ["0001", "68.5", "±", "1.0", "-"] in [row[:5] for row in rows]
    assert ["0002", "69.2", "±", "0.7~", "-"] in [row[:5] for row in rows]
    assert not any(row[:1] == ["0009"] for row in rows)
    assert "mean of 2 further seeds ± spread of all 3" in stream.getvalue()


def test_front_line() -> None:
    front = build_front(
        [DENSE, record("0001", 0.5, 70.0), record("0002", 0.25, 60.0)], "effective_gmacs"
    )
    assert front_line(front) == "0.25x 60.0 %, 0.50x 70.0 %; hypervolume 0.5000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.6, "4 s"), (59.6, "1:00 min"), (65, "1:05 min"), (3600, "1:00 h"), (7620, "2:07 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_learning_is_told_before_the_trials(progress: Progress, clock: Clock) -> None:
    progress.learning(["uvc", "vit_slim"])
    clock.now += 95.0
    progress.still_learning(["uvc"])
    progress.learned("uvc for 0.50x: learned in 97 s")
    assert lines(progress) == [
        "learning once for all trials: uvc, vit_slim",
        "  learning for 1:35 min, not done: uvc",
        "  uvc for 0.50x: learned in 97 s",
    ]


def test_that_mlflow_lags_behind_is_said_once(progress: Progress) -> None:
    for trouble in ("", "refused", "refused", "", "refused"):
        progress.tick(trouble)
    assert lines(progress) == ["MLflow lags behind, trials go on: refused"] * 2
