from __future__ import annotations

import io
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from cluster.due import Outcome, dry_run, due, show_coming
from cluster.jobs import JobExistsError
from cluster.schedules import Claim, Schedule, run_name, slots, unstamp
from cluster.slots import Slots
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep
from tests.cluster.memory import Memory, finish
from tests.processes import ROOT

SWEEP = ROOT / "search" / "sweeps" / "sample.toml"
STORAGE = 'storage="/shared"'
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
SPRING = datetime(2026, 3, 28, 23, tzinfo=UTC)  # before the night that in Berlin has no 2:30
AUTUMN = datetime(2026, 10, 24, 23, tzinfo=UTC)  # before the one that has two


class DiedError(BaseException):
    """The machine that calls `due` dies."""


class FakeCluster:
    """A cluster whose jobs run until they are ended."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.submitted: list[str] = []
        self.overrides: dict[str, list[str]] = {}
        self.up = True
        self.dies: str | None = None  # the caller, "before" or "after" it has submitted
        self.check: Callable[[str], None] = lambda job: None

    def submit(self, path: Path, overrides: Sequence[str], *, job: str) -> None:
        dies, self.dies = self.dies, None
        if not self.up:
            raise ConnectionError("cluster does not answer; start it")
        if dies == "before":
            raise DiedError
        assert load_sweep(path, overrides).name == job
        if job in self.jobs:
            raise JobExistsError(job)
        self.check(job)
        self.jobs[job] = "running"
        self.submitted.append(job)
        self.overrides[job] = list(overrides)
        if dies == "after":
            raise DiedError

    def state(self, job: str) -> str | None:
        if not self.up:
            raise ConnectionError("cluster does not answer; start it")
        return self.jobs.get(job)

    def end(self) -> None:
        self.jobs = dict.fromkeys(self.jobs, "ended")

    def rebuild(self) -> None:
        self.jobs = {}


class World:
    """Schedules, their record and a cluster, with a clock that is what one says."""

    def __init__(self, record: Slots | Memory | None = None, **values: object) -> None:
        defaults = {"name": "s", "cron": "0 * * * *", "zone": "Europe/Berlin", "sweep": SWEEP}
        defaults["overrides"] = (STORAGE,)
        self.schedule = Schedule.model_validate(defaults | values)
        self.slots = Memory() if record is None else record
        self.cluster = FakeCluster()
        self.said = ""

    def due(self, now: datetime, slots: Slots | Memory | None = None) -> Outcome:
        """Call `due`, on some machine; what it says is kept."""
        stream = io.StringIO()
        outcome = due([self.schedule], slots or self.slots, self.cluster, now, stream)
        self.said = stream.getvalue()
        return outcome

    def times(self) -> list[str]:
        """Slots that were submitted."""
        return [f"{self.slot(job):%H:%M}" for job in self.cluster.submitted]

    @staticmethod
    def slot(job: str) -> datetime:
        return unstamp(job.rpartition("-")[2])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def test_a_slot_is_submitted_once() -> None:
    world = World()
    assert world.due(NOON) == Outcome(submitted=("s-20261125T1200Z",))
    assert world.said == "s-20261125T1200Z submitted: due at 2026-11-25 12:00 UTC\n"
    for minutes in range(1, 60):
        assert world.due(NOON + minutes * MINUTE) == Outcome()
        assert world.said == ""
    world.cluster.end()
    assert world.due(NOON + HOUR).submitted == ("s-20261125T1300Z",)


@pytest.mark.slow
def test_each_minute_each_slot_is_submitted_once_at_its_minute() -> None:
    for start in (SPRING, AUTUMN):
        for cron in ("30 2 * * *", "*/30 2 * * *", "*/20 * * * *", "15 1-3 * * *"):
            world = World(cron=cron)
            for minute in range(210):
                now = start + minute * MINUTE
                for host in ("a", "b"):
                    for job in world.due(now, Memory(host=host, of=world.slots)).submitted:
                        assert world.slot(job) == now
                world.cluster.end()
            expected = slots(world.schedule, start - MINUTE, now)
            assert world.cluster.submitted == [run_name(world.schedule, s) for s in expected]
            assert expected or (start, cron) == (SPRING, "*/30 2 * * *")


def test_a_clock_that_goes_back_runs_nothing_twice() -> None:
    world = World()
    world.due(NOON)
    world.cluster.end()
    for hours in (0.1, 1, 3, 0, 2):
        world.due(NOON - hours * HOUR)
    assert world.times() == ["12:00"]
    assert world.due(NOON - HOUR).exit_code == 1
    assert "the record goes to 2026-11-25 12:00 UTC and the clock says 2026-11-25 11:00" in (
        world.said
    )


@pytest.mark.parametrize(
    ("catch_up", "times"), [("last", ["12:00", "18:00", "19:00"]), ("none", ["12:00", "19:00"])]
)
def test_slots_that_were_missed(catch_up: str, times: list[str]) -> None:
    world = World(catch_up=catch_up)
    world.due(NOON)
    world.cluster.end()
    world.due(NOON + 6.5 * HOUR)  # down time, or the clock was set forward
    world.cluster.end()
    world.due(NOON + 6.5 * HOUR)
    world.due(NOON + 7 * HOUR)
    assert world.times() == times


def test_slots_are_skipped_while_the_last_run_is_running() -> None:
    world = World()
    world.due(NOON)
    world.due(NOON + HOUR)
    assert world.said == ("s-20261125T1300Z skipped: s-20261125T1200Z is still running\n")
    world.due(NOON + HOUR + MINUTE)
    assert world.said == ""
    world.cluster.end()
    for minutes in range(1, 121):
        world.due(NOON + HOUR + minutes * MINUTE)
    assert world.times() == ["12:00", "14:00"]


@pytest.mark.parametrize("catch_up", ["last", "none"])
def test_the_latest_slot_waits_for_the_end_of_the_last_run(catch_up: str) -> None:
    world = World(overlap="queue", catch_up=catch_up)
    world.due(NOON)
    said = []
    for minutes in range(1, 150):
        world.due(NOON + minutes * MINUTE)
        said += [world.said] if world.said else []
    assert [line.split(":")[0] for line in said] == [
        "s-20261125T1300Z waiting",
        "s-20261125T1400Z waiting",
    ]
    world.cluster.end()
    world.due(NOON + 150 * MINUTE)
    world.cluster.end()
    world.due(NOON + 151 * MINUTE)
    assert world.times() == ["12:00", "14:00"]


def test_a_cluster_that_was_rebuilt_runs_nothing_again() -> None:
    world = World()
    world.due(NOON)
    world.cluster.rebuild()
    for minutes in range(60):
        world.due(NOON + minutes * MINUTE)
    assert world.times() == ["12:00"]
    world.due(NOON + HOUR)  # what was running there is not running any more
    assert world.times() == ["12:00", "13:00"]


@pytest.mark.parametrize("dies", ["before", "after"])
def test_what_a_machine_left_that_died(dies: str) -> None:
    world = World()
    world.cluster.dies = dies
    with pytest.raises(DiedError):
        world.due(NOON)
    other = Memory(host="b", of=world.slots)
    for minutes in range(1, 10):
        world.due(NOON + minutes * MINUTE, other)
        if minutes < 5:
            assert world.times() == ([] if dies == "before" else ["12:00"])
    assert world.times() == ["12:00"]
    last = world.slots.record(world.schedule).last
    assert last is not None
    assert last.submitted
    assert last.host == ("b" if dies == "before" else "a")


def test_a_job_that_the_cluster_knows_counts_as_submitted() -> None:
    world = World()
    world.cluster.jobs["s-20261125T1200Z"] = "ended"
    assert world.due(NOON) == Outcome()
    assert world.said == "s-20261125T1200Z had been submitted: the cluster knows the job\n"
    last = world.slots.record(world.schedule).last
    assert last is not None
    assert last.submitted


def test_a_cluster_that_does_not_answer_is_asked_before_anything_is_claimed() -> None:
    world = World()
    world.cluster.up = False
    assert world.due(NOON) == Outcome(failed=("s",))
    assert world.said == "error: s: cluster does not answer; start it\n"
    assert world.slots.record(world.schedule).seen is None
    assert world.due(NOON - MINUTE).exit_code == 0  # nothing is due: it is not asked
    world.cluster.up = True
    world.due(NOON + MINUTE)
    assert world.times() == ["12:00"]


def test_what_is_wrong_with_one_schedule_does_not_keep_the_others(tmp_path: Path) -> None:
    world = World()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(SWEEP.read_text().replace("trials = 24", "trials = 1"))
    values = {
        "a": {"sweep": tmp_path / "none.toml"},
        "b": {},
        "c": {"sweep": wrong},
        "d": {"overrides": ("trials",)},
        "e": {},
    }
    every = [world.schedule.model_copy(update={"name": n, **v}) for n, v in values.items()]
    stream = io.StringIO()
    outcome = due(every, world.slots, world.cluster, NOON, stream)
    assert outcome.submitted == ("b-20261125T1200Z", "e-20261125T1200Z")
    assert outcome.failed == ("a", "c", "d")
    assert outcome.exit_code == 1
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert re.match(r"error: a: sweep .*none.toml does not exist; give", lines[0])
    assert re.match(r"error: c: .*wrong.toml: trials is 1; input should be", lines[2])
    assert re.match(r"error: d: --set 'trials' is no setting; give KEY=VALUE", lines[3])
    assert set(world.slots.claims) == {"b", "e"}  # a slot whose sweep is wrong stays free


def test_what_the_cluster_refuses_is_tried_again() -> None:
    world = World()

    def refuse(job: str) -> None:
        raise SweepError("data.train is 'x', which does not exist; give a file")

    world.cluster.check = refuse
    assert world.due(NOON).failed == ("s",)
    world.cluster.check = lambda job: None
    assert world.due(NOON + 4 * MINUTE) == Outcome()
    assert world.due(NOON + 5 * MINUTE).submitted == ("s-20261125T1200Z",)


def test_what_a_run_is_given() -> None:
    world = World(overrides=("trials=40", STORAGE))
    world.due(NOON)
    (given_,) = world.cluster.overrides.values()
    sweep = load_sweep(SWEEP, given_)
    assert (sweep.name, sweep.trials) == ("s-20261125T1200Z", 40)
    assert (sweep.tracking, sweep.start_from) == ("http://memory", None)


def test_the_runs_of_a_schedule_are_versions_of_one_model() -> None:
    world = World()
    jobs = [*world.due(NOON).submitted]
    world.cluster.end()
    jobs += world.due(NOON + HOUR).submitted
    sweeps = [load_sweep(SWEEP, world.cluster.overrides[job]) for job in jobs]
    assert len({sweep.name for sweep in sweeps}) == 2
    assert [sweep.model_name for sweep in sweeps] == ["s", "s"]
    named = World(overrides=(STORAGE, 'registered_model="mine"'))
    (job,) = named.due(NOON).submitted
    assert load_sweep(SWEEP, named.cluster.overrides[job]).model_name == "mine"


def test_a_run_starts_from_the_last_one_that_finished() -> None:
    world = World(start_from_last=True)
    starts = []
    for hours in range(4):
        (job,) = world.due(NOON + hours * HOUR).submitted
        world.cluster.end()
        if hours != 1:
            finish(world.slots, job)
        starts.append(load_sweep(SWEEP, world.cluster.overrides[job]).start_from)
    first = "/shared/s-20261125T1200Z"
    assert starts == [None, first, first, "/shared/s-20261125T1400Z"]


def test_what_a_job_would_not_find_is_refused_before_it_is_claimed() -> None:
    world = World(overrides=())
    assert world.due(NOON).exit_code == 1
    assert world.said.startswith("error: s: storage is 'results', which goes when the job ends")
    assert world.slots.record(world.schedule).seen is None


def test_a_sweep_logs_to_where_its_slots_are_recorded() -> None:
    world = World(overrides=(STORAGE, 'tracking="http://other"'))
    assert world.due(NOON).exit_code == 1
    assert "has tracking = 'http://other', but slots are recorded in 'http://memory'" in world.said
    same = World(overrides=(STORAGE, 'tracking="http://memory/"'))
    assert same.due(NOON).exit_code == 0


def test_a_run_that_is_deleted_and_running() -> None:
    world = World()
    world.due(NOON)
    world.slots._replace(world.slots.record(world.schedule).last, deleted=True)
    assert world.due(NOON + HOUR).failed == ("s",)
    assert "is deleted in MLflow while its job is running" in world.said


def test_dry_run_does_nothing_and_says_why() -> None:
    world = World(cron="0 */12 * * *", zone="UTC")
    world.due(NOON)
    schedules = [
        world.schedule.model_copy(update={"name": "new", "cron": "0 0 * * *"}),
        world.schedule,
        world.schedule.model_copy(update={"name": "wrong", "overrides": ("trials",)}),
    ]
    stream, later = io.StringIO(), NOON + 12 * HOUR
    outcome = dry_run(schedules, world.slots, world.cluster, later, stream)
    assert outcome == Outcome(failed=("wrong",))
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [
        "new: would run new-20261126T0000Z: due at 2026-11-26 00:00 UTC",
        "s: would skip s-20261126T0000Z: s-20261125T1200Z is still running",
        "error: wrong: --set 'trials' is no setting; give KEY=VALUE, for example trials=8",
    ]
    assert world.times() == ["12:00"]
    assert not world.slots.marks
    assert set(world.slots.claims) == {"s"}
    assert lines[3].startswith("Slots of the coming 7 days")
    assert len(lines) == 5 + 7 + 14 + 14


def test_what_is_coming_is_printed() -> None:
    daily = World(cron="30 2 * * *", name="daily").schedule
    minutely = World(cron="* * * * *", name="minutely", zone="Asia/Kolkata").schedule
    stream = io.StringIO()
    show_coming([daily, minutely], AUTUMN, stream, days=2)
    lines = stream.getvalue().splitlines()
    assert lines[2].split()[:7] == [
        "Sun",
        "2026-10-25",
        "04:31",
        "IST",
        "10-24",
        "23:01",
        "minutely",
    ]
    assert lines[-1] == f"and {2 * 24 * 60 - 50} more of minutely"
    table = [line.split() for line in lines if "daily" in line]
    assert [row[1:7] for row in table] == [
        ["2026-10-25", "02:30", "CEST", "10-25", "00:30", "daily"],
        ["2026-10-26", "02:30", "CET", "10-26", "01:30", "daily"],
    ]
    stream = io.StringIO()
    show_coming([World(cron="0 0 1 1 *").schedule], NOON, stream)
    assert stream.getvalue() == "no slot in the coming 7 days\n"


class Meeting(Memory):
    """A record in which another machine may act between what one reads and what it claims."""

    meanwhile: Callable[[], None] | None = None

    def claim(self, schedule: Schedule, slot: datetime, now: datetime) -> Claim | None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()
        return super().claim(schedule, slot, now)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["", "", "meet", "before", "after", "end", "rebuild", "down"]),
        st.one_of(st.integers(0, 90), st.integers(-400, 1500)),  # minutes; clocks are wrong, too
        st.integers(-120, 120),  # of another machine
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    STEPS,
    st.sampled_from(["30 2 * * *", "*/30 * * * *", "*/7 1-3 * * *"]),
    st.sampled_from(["skip", "queue"]),
    st.sampled_from(["last", "none"]),
    st.sampled_from([SPRING, AUTUMN]),
)
def test_whatever_happens_no_slot_runs_twice_nor_before_a_later_one(
    steps: list[tuple[str, int, int]], cron: str, overlap: str, catch_up: str, now: datetime
) -> None:
    world = World(Meeting(), cron=cron, overlap=overlap, catch_up=catch_up)
    unsure: set[str] = set()  # of which only a cluster that is gone knew that they ran

    def check(job: str) -> None:
        record = world.slots.record(world.schedule)
        assert record.last is not None
        assert record.last.slot == world.slot(job)  # nothing later was claimed
        assert world.slot(job) not in record.skipped
        assert not record.last.submitted

    world.cluster.check = check
    for what, minutes, others in steps:
        now += minutes * MINUTE
        world.cluster.up = what != "down"
        if what == "end":
            world.cluster.end()
        if what == "rebuild":
            world.cluster.rebuild()
        other = Memory(host="b", of=world.slots)
        if what == "meet":
            world.slots.meanwhile = lambda: world.due(now + others * MINUTE, other)  # noqa: B023
        world.cluster.dies = what if what in ("before", "after") else None
        before = len(world.cluster.submitted)
        try:
            world.due(now)
            world.due(now + MINUTE, other)
        except DiedError:
            unsure |= set(world.cluster.submitted[before:])
    counts = Counter(world.cluster.submitted)
    assert {job for job, count in counts.items() if count > 1} <= unsure


CALLS = """
import io, os, sys, time
from datetime import datetime, timedelta
from pathlib import Path
from cluster.due import due
from cluster.schedules import Schedule
from cluster.slots import Slots

class Cluster:
    "Takes the same job as often as it is submitted, unlike Ray: the claim alone must do."
    def state(self, job):
        return "running" if hours == 2 else "ended"
    def submit(self, path, overrides, *, job):
        os.write(1, f"{job} ".encode())

def call(number):
    slots, stream = Slots(uri, host=str(number)), io.StringIO()
    time.sleep(max(0.0, start - time.time()))
    now = datetime.fromisoformat("20261125T1200Z") + timedelta(hours=hours)
    code = due(every, slots, Cluster(), now, stream).exit_code
    os.write(2, stream.getvalue().encode())
    os._exit(code)

uri, sweep, failed = sys.argv[1], Path(sys.argv[2]), 0
values = {"cron": "0 * * * *", "zone": "UTC", "sweep": sweep, "overrides": [sys.argv[3]]}
every = [Schedule(name=name, **values) for name in "xy"]
try:  # loads all of MLflow that is needed, once for all
    Slots("http://127.0.0.1:9").record(every[0])
except ConnectionError:
    pass
for hours in range(3):
    start = time.time() + 0.2
    for number in range(6):
        if os.fork() == 0:
            call(number)
    failed += sum(os.wait()[1] != 0 for _ in range(6))
sys.exit(failed)
"""


@pytest.mark.slow
def test_of_many_processes_one_submits(uri: str) -> None:
    command = [sys.executable, "-c", CALLS, uri, str(SWEEP), STORAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    jobs = [f"{name}-20261125T1{hour}00Z" for name in "xy" for hour in (2, 3)]
    assert sorted(done.stdout.split()) == jobs
    for name in "xy":
        record = Slots(uri).record(World(name=name).schedule)
        assert record.skipped == {NOON + 2 * HOUR}
        assert record.last
        assert record.last.submitted


@pytest.mark.slow
def test_against_a_server(uri: str) -> None:
    world = World(Slots(uri), name="server", start_from_last=True)
    world.cluster.dies = "before"
    with pytest.raises(DiedError):
        world.due(NOON)
    (first,) = world.due(NOON + 5 * MINUTE, Slots(uri)).submitted
    world.due(NOON + HOUR)
    assert "skipped" in world.said
    finish(world.slots, first)
    world.cluster.end()
    assert world.due(NOON + HOUR + MINUTE) == Outcome()
    (second,) = world.due(NOON + 2 * HOUR).submitted
    sweep = load_sweep(SWEEP, world.cluster.overrides[second])
    assert (sweep.tracking, sweep.start_from) == (uri, f"/shared/{first}")
    tags = MlflowClient(tracking_uri=uri).get_experiment_by_name(first).tags
    assert tags["prunefront.state"] == "submitted"
    assert tags["prunefront.job"] == first
    assert tags["prunefront.slot"] == "20261125T1200Z"
    assert tags["prunefront.skipped.20261125T1300Z"] == (NOON + HOUR).isoformat()
