from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.schedules import (
    Claim,
    Record,
    Schedule,
    choose,
    coming,
    latest,
    load_schedules,
    run_name,
    slots,
    stamp,
    unstamp,
)
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep
from tests.processes import ROOT

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
SPRING = datetime(2026, 3, 28, 12, tzinfo=UTC)  # in Berlin 2:00 to 3:00 is missing the night after
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=UTC)  # and here comes twice
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def schedule(cron: str = "0 * * * *", zone: str = "Europe/Berlin", **values: object) -> Schedule:
    return Schedule.model_validate(
        {"name": "s", "sweep": "s.toml", "cron": cron, "zone": zone} | values
    )


def claim(slot: datetime, *, submitted: bool = True, at: datetime | None = None) -> Claim:
    return Claim(
        slot=slot,
        name=run_name(schedule(), slot),
        experiment="7",
        submitted=submitted,
        at=at or slot,
        host="a",
        clock=schedule().clock,
    )


def within(cron: str, start: datetime, hours: int = 48) -> list[str]:
    found = slots(schedule(cron), start, start + hours * HOUR)
    return [slot.strftime("%d %H:%M") for slot in found]


def test_a_cron_line_is_read_by_the_zones_clock() -> None:
    assert within("0 2 * * *", NOON) == ["26 01:00", "27 01:00"]
    summer = datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert within("0 2 * * *", summer) == ["02 00:00", "03 00:00"]
    assert slots(schedule("0 2 * * *", "Asia/Kolkata"), NOON, NOON + 24 * HOUR) == [
        datetime(2026, 11, 25, 20, 30, tzinfo=UTC)
    ]


def test_slots_are_after_one_moment_up_to_another() -> None:
    hourly = schedule()
    assert slots(hourly, NOON, NOON + HOUR) == [NOON + HOUR]
    assert slots(hourly, NOON - MINUTE, NOON + HOUR - MINUTE) == [NOON]
    assert slots(hourly, NOON, NOON) == slots(hourly, NOON + HOUR, NOON) == []


@pytest.mark.parametrize(
    ("cron", "spring", "autumn"),
    [
        ("30 2 * * *", ["29 01:00", "30 00:30"], ["25 00:30", "26 01:30"]),
        ("15,45 2 * * *", ["29 01:00", "30 00:15"], ["25 00:15", "25 00:45"]),
        ("0 3 * * *", ["29 01:00", "30 01:00"], ["25 02:00", "26 02:00"]),
        # with a star the clock's readings count
        ("*/30 2 * * *", ["30 00:00", "30 00:30"], ["25 00:00", "25 00:30"]),
    ],
)
def test_daylight_saving_nights(cron: str, spring: list[str], autumn: list[str]) -> None:
    assert within(cron, SPRING)[:2] == spring
    assert within(cron, AUTUMN)[:2] == autumn


def test_a_doubled_hour_has_slots_of_different_names() -> None:
    night = within("*/30 2 * * *", AUTUMN, 24)
    assert night == ["25 00:00", "25 00:30", "25 01:00", "25 01:30"]
    for start in (SPRING, AUTUMN):  # half an hour apart all through the night
        found = slots(schedule("*/30 * * * *"), start, start + 24 * HOUR)
        assert [b - a for a, b in pairwise(found)] == [HOUR / 2] * 47
        assert len({run_name(schedule(), slot) for slot in found}) == 48


CRONS = st.sampled_from(
    ["30 2 * * *", "*/30 2 * * *", "7 1-3 * * *", "0 */2 * * *", "*/20 * * * *", "0 0 * * SUN"]
)
ZONES = st.sampled_from(["Europe/Berlin", "America/New_York", "Africa/Cairo", "UTC"])


@given(CRONS, ZONES, st.sampled_from([SPRING, AUTUMN]), st.lists(st.integers(0, 3600), max_size=6))
def test_slots_do_not_depend_on_when_one_asks(
    cron: str, zone: str, start: datetime, minutes: list[int]
) -> None:
    each = schedule(cron, zone)
    moments = [start, *(start + m * MINUTE for m in sorted(minutes)), start + 3600 * MINUTE]
    parts = [slot for a, b in pairwise(moments) for slot in slots(each, a, b)]
    whole = slots(each, start, moments[-1])
    assert parts == whole == sorted(set(whole))


@given(CRONS, st.integers(0, 1000), st.integers(0, 200))
def test_the_latest_is_the_last(cron: str, hours: int, later: int) -> None:
    after, until = SPRING + hours * HOUR, SPRING + (hours + later) * HOUR
    found = slots(schedule(cron), after, until)
    assert latest(schedule(cron), after, until) == (found[-1] if found else None)


def test_the_latest_of_a_year_is_found_at_once() -> None:
    year = NOON - timedelta(days=365)
    assert latest(schedule("* * * * *"), year, NOON) == NOON
    assert latest(schedule("0 0 29 2 *"), year, NOON) is None


@given(st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.timezones()))
def test_a_stamp_says_the_slot(moment: datetime) -> None:
    slot = moment.astimezone(UTC).replace(second=0, microsecond=0)
    assert unstamp(stamp(slot)) == slot
    assert re.fullmatch(r"\d{8}T\d{4}Z", stamp(moment))


def decided(each: Schedule, record: Record, job: str | None, now: datetime) -> str:
    decision = choose(each, record, job, now)
    return f"{decision.action} {decision.slot:%H:%M}" if decision.slot else decision.action


def test_a_new_schedule_runs_no_old_slot() -> None:
    for catch_up in ("last", "none"):
        new = schedule(catch_up=catch_up)
        assert decided(new, Record(), None, NOON) == "run 12:00"
        assert decided(new, Record(), None, NOON + 9 * MINUTE) == "run 12:00"
        assert decided(new, Record(), None, NOON + 10 * MINUTE) == "rest"


def test_after_down_time_the_last_slot_runs_or_none() -> None:
    record = Record(last=claim(NOON - 100 * HOUR))
    late = NOON + 30 * MINUTE
    assert decided(schedule(), record, "ended", late) == "run 12:00"
    assert decided(schedule(catch_up="none"), record, "ended", late) == "rest"
    assert decided(schedule(catch_up="none"), record, "ended", NOON + MINUTE) == "run 12:00"
    assert "0:30:00 late" in choose(schedule(), record, "ended", late).why


def test_nothing_runs_again_when_the_clock_goes_back() -> None:
    record = Record(last=claim(NOON))
    for hours in (0, 1, 5, 30):
        assert decided(schedule(), record, "ended", NOON - hours * HOUR) == "rest"


def test_another_cron_line_brings_no_old_slot() -> None:
    record = Record(last=claim(NOON - 100 * HOUR))
    other = schedule("30 * * * *")
    assert decided(other, record, "ended", NOON + 29 * MINUTE) == "rest"
    assert decided(other, record, "ended", NOON + 31 * MINUTE) == "run 12:30"


def test_a_slot_that_meets_a_running_one_is_skipped_or_waits() -> None:
    record = Record(last=claim(NOON - HOUR))
    assert decided(schedule(), record, "running", NOON) == "skip 12:00"
    assert decided(schedule(overlap="queue"), record, "running", NOON) == "wait 12:00"
    assert decided(schedule(), record, "running", NOON - MINUTE) == "rest"
    assert decided(schedule(), record, None, NOON) == "run 12:00"  # the cluster was rebuilt


def test_what_was_skipped_does_not_run_late() -> None:
    record = Record(last=claim(NOON - HOUR), skipped=frozenset({NOON}))
    assert decided(schedule(), record, "ended", NOON + MINUTE) == "rest"
    assert decided(schedule(), record, "ended", NOON + HOUR) == "run 13:00"


@pytest.mark.parametrize("catch_up", ["last", "none"])
def test_the_latest_slot_waits(catch_up: str) -> None:
    queue = schedule(overlap="queue", catch_up=catch_up)
    record = Record(last=claim(NOON - HOUR), waiting=frozenset({NOON}))
    assert decided(queue, record, "running", NOON + 30 * MINUTE) == "wait 12:00"
    assert decided(queue, record, "ended", NOON + 30 * MINUTE) == "run 12:00"
    assert decided(queue, record, "ended", NOON - MINUTE) == "rest"  # the clock went back
    assert decided(queue, record, "running", NOON + HOUR) == "wait 13:00"
    assert decided(queue, record, "ended", NOON + HOUR) == "run 13:00"
    ran = Record(last=claim(NOON), waiting=frozenset({NOON}))
    assert decided(queue, ran, "ended", NOON + MINUTE) == "rest"


def test_a_claim_without_submission_is_taken_up_again() -> None:
    record = Record(last=claim(NOON, submitted=False, at=NOON))
    for away in (4 * MINUTE, -4 * MINUTE):  # also where the other machine's clock is ahead
        assert decided(schedule(), record, None, NOON + away) == "rest"
    assert decided(schedule(), record, None, NOON + 5 * MINUTE) == "again 12:00"
    assert decided(schedule(), record, "running", NOON + 5 * MINUTE) == "rest"
    assert decided(schedule(), record, "ended", NOON + 5 * MINUTE) == "rest"
    assert decided(schedule(), record, None, NOON - HOUR) == "rest"
    ahead = Record(last=claim(NOON, submitted=False, at=NOON + 3 * HOUR))  # nobody waits so long
    assert decided(schedule(), ahead, None, NOON + 5 * MINUTE) == "again 12:00"
    late = NOON + 11 * MINUTE
    assert decided(schedule(), record, None, late) == "again 12:00"
    assert decided(schedule(catch_up="none"), record, None, late) == "rest"


def test_a_newer_slot_takes_the_place_of_a_claim_without_submission() -> None:
    record = Record(last=claim(NOON - HOUR, submitted=False))
    assert decided(schedule(), record, None, NOON) == "run 12:00"
    fresh = Record(last=claim(NOON - HOUR, submitted=False, at=NOON - MINUTE))
    assert decided(schedule(), fresh, None, NOON) == "skip 12:00"
    assert decided(schedule(overlap="queue"), fresh, None, NOON) == "wait 12:00"


def test_what_is_coming() -> None:
    daily = schedule("0 2 * * *", name="daily")
    weekly = schedule("0 2 * * SUN", "America/New_York", name="weekly")
    rows = coming([weekly, daily], SPRING, days=2)
    assert [(row.schedule.name, f"{row.local:%a %H:%M %Z}") for row in rows] == [
        ("daily", "Sun 03:00 CEST"),
        ("weekly", "Sun 02:00 EDT"),
        ("daily", "Mon 02:00 CEST"),
    ]


def test_the_example_is_valid() -> None:
    (example,) = load_schedules(ROOT / "cluster" / "schedules.toml")
    sweep = load_sweep(example.sweep, example.overrides)
    assert example.sweep.name == "sample.toml"
    assert sweep.directory == Path("/shared/results/sample")
    assert ".." not in example.sweep.parts


def test_every_key_is_in_the_example() -> None:
    text = (ROOT / "cluster" / "schedules.toml").read_text()
    assert re.findall(r"^(\w+) =", text, re.M) == list(Schedule.model_fields)


def test_sweeps_are_found_from_the_file_on(tmp_path: Path) -> None:
    table = '[[schedules]]\nname = "{}"\ncron = "0 2 * * *"\nzone = "UTC"\nsweep = "{}"\n'
    path = tmp_path / "schedules.toml"
    path.write_text(table.format("a", "../a.toml") + table.format("b", "/b.toml"))
    assert [s.sweep for s in load_schedules(path)] == [tmp_path.parent / "a.toml", Path("/b.toml")]


GOOD = 'name = "a"\ncron = "0 2 * * *"\nzone = "UTC"\nsweep = "a.toml"\n'


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "schedules is missing; give it a value"),
        ("schedule = []", "schedule is an unknown key; did you mean 'schedules'? (and 1 more)"),
        (GOOD + "crom = 1", "schedules.0.crom is an unknown key; did you mean 'cron'?"),
        (
            GOOD + "xyzzy = 1",
            "schedules.0.xyzzy is an unknown key; there are name, cron, zone, sweep, overrides, "
            "overlap, catch_up, start_from_last",
        ),
        (GOOD.replace('zone = "UTC"', ""), "schedules.0.zone is missing; give it a value"),
        (
            GOOD.replace("UTC", "Europe/Berln"),
            "schedules.0.zone is 'Europe/Berln', which is no time zone; "
            "did you mean 'Europe/Berlin'?",
        ),
        (
            GOOD.replace("UTC", "Europe"),
            "schedules.0.zone is 'Europe', which is no time zone; ",
        ),
        (
            GOOD.replace("0 2 *", "0 24 *"),
            "schedules.0.cron is '0 24 * * *', whose hour is wrong; give minute hour day-of-month "
            "month day-of-week, for example '0 2 * * MON'",
        ),
        (GOOD.replace("0 2 *", "0 2"), "is '0 2 * *', with 4 of 5 fields; give minute"),
        (GOOD.replace("0 2 *", "0 0 2 *"), "is '0 0 2 * * *', with 6 of 5 fields; give minute"),
        (GOOD.replace("0 2 * * *", "0 2 */40 * MON#5"), "which never comes; give minute"),
        (
            GOOD.replace('"a"', '"a b"'),
            "schedules.0.name is 'a b'; string should match pattern",
        ),
        (GOOD.replace('"a"', f'"{"a" * 81}"'), "should have at most 80 characters"),
        (GOOD + 'overlap = "queu"', "schedules.0.overlap is 'queu'; input should be 'skip' or"),
        (GOOD + 'catch_up = "all"', "schedules.0.catch_up is 'all'; input should be 'last' or"),
        (
            GOOD + "overrides = ['name=\"b\"']",
            "schedules.0.overrides has 'name=\"b\"'; leave the name out, each slot has its own",
        ),
        (
            GOOD + "[[schedules]]\n" + GOOD.replace('"a"', '"A"'),
            "schedules has the name 'a' twice; give each schedule a name of its own",
        ),
        ("cron = 0 2", "is not TOML: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "schedules.toml"
    path.write_text(f"[[schedules]]\n{toml}" if "name" in toml else toml)
    with pytest.raises(SweepError) as error:
        load_schedules(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"x\.toml does not exist; give a TOML file like"):
        load_schedules(tmp_path / "x.toml")


@given(st.lists(st.text("0123456789*/-,L#W ", max_size=4), min_size=5, max_size=5))
@example(["0", "0", "L", "*", "5L/2"])
@example(["0", "0", "LW/2", "*", "²L"])
def test_a_cron_line_is_valid_or_refused(fields: list[str]) -> None:
    try:
        each = schedule(" ".join(fields))
    except ValidationError:
        return
    assert slots(each, SPRING, SPRING + timedelta(days=40)) is not None
