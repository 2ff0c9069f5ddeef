from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.schedules import Record, Schedule, run_name
from cluster.slots import Slots
from search.sweep.spec import SweepError
from search.tracking.runs import SweepRuns
from tests.cluster.memory import Memory, finish
from tests.search.logged import TINY_SHAPE, tracked

pytestmark = pytest.mark.slow  # stores of MLflow are opened for real

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(params=["memory", "sqlite"])
def slots(request: pytest.FixtureRequest) -> Slots | Memory:
    if request.param == "memory":
        return Memory()
    return Slots(request.getfixturevalue("uri"), host="a")


@pytest.fixture
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """A schedule that no other test has, so that tests may share a database."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return Schedule(name=name, cron="0 * * * *", zone="UTC", sweep=Path("s.toml"))


def test_nothing_is_recorded_at_first(slots: Slots | Memory, schedule: Schedule) -> None:
    assert slots.record(schedule) == Record()
    assert slots.last_finished(schedule) is None


def test_a_slot_is_claimed_once(slots: Slots | Memory, schedule: Schedule) -> None:
    claim = slots.claim(schedule, NOON, NOON + MINUTE)
    assert claim is not None
    assert claim.name == f"{schedule.name}-20261125T1200Z"
    assert (claim.slot, claim.at) == (NOON, NOON + MINUTE)
    assert (claim.host, claim.clock) == ("a", "0 * * * * UTC")
    assert not claim.submitted
    assert slots.claim(schedule, NOON, NOON) is None
    assert slots.claim(schedule, NOON + HOUR, NOON) is not None


def test_claims_are_confirmed_and_renewed(slots: Slots | Memory, schedule: Schedule) -> None:
    claim = slots.claim(schedule, NOON, NOON)
    assert claim is not None
    assert slots.record(schedule).last == claim
    slots.renew(claim, NOON + MINUTE)
    assert slots.record(schedule).last == replace(claim, at=NOON + MINUTE)
    slots.confirm(claim, NOON + HOUR)
    assert slots.record(schedule).last == replace(claim, at=NOON + MINUTE, submitted=True)


def test_slots_are_noted_as_skipped_and_waiting(slots: Slots | Memory, schedule: Schedule) -> None:
    claim = slots.claim(schedule, NOON, NOON)
    assert claim is not None
    slots.mark(claim, NOON + 2 * HOUR, "waiting", NOON)
    slots.mark(claim, NOON + HOUR, "skipped", NOON)
    slots.mark(claim, NOON + HOUR, "skipped", NOON + MINUTE)
    record = slots.record(schedule)
    assert record.skipped == {NOON + HOUR}
    assert record.waiting == {NOON + 2 * HOUR}
    assert record.seen == record.queued == NOON + 2 * HOUR


def test_the_last_is_of_the_latest_slot(slots: Slots | Memory, schedule: Schedule) -> None:
    for hours in (1, 3, 2):
        slots.claim(schedule, NOON + hours * HOUR, NOON)
    last = slots.record(schedule).last
    assert last is not None
    assert last.slot == NOON + 3 * HOUR


def test_the_last_run_that_finished(slots: Slots | Memory, schedule: Schedule) -> None:
    names = [run_name(schedule, NOON + hours * HOUR) for hours in range(4)]
    for hours in range(4):
        slots.claim(schedule, NOON + hours * HOUR, NOON)
    finish(slots, names[0])
    assert slots.last_finished(schedule) == names[0]
    finish(slots, names[1])
    finish(slots, names[2], "FAILED")
    assert slots.last_finished(schedule) == names[1]


def test_schedules_are_kept_apart(slots: Slots | Memory, schedule: Schedule) -> None:
    slots.claim(schedule, NOON, NOON)
    other = schedule.model_copy(update={"name": schedule.name + "-"})
    assert slots.record(other) == Record()
    assert slots.claim(other, NOON, NOON) is not None


def test_a_deleted_experiment_is_a_claim_still(uri: str, schedule: Schedule) -> None:
    slots, client = Slots(uri), MlflowClient(tracking_uri=uri)
    claim = slots.claim(schedule, NOON, NOON)
    assert claim is not None
    finish(slots, claim.name)
    client.delete_experiment(claim.experiment)
    assert slots.claim(schedule, NOON, NOON) is None
    # nobody wants it submitted any more, nor anything to start from it
    assert slots.record(schedule).last == replace(claim, submitted=True, deleted=True)
    assert slots.last_finished(schedule) is None


def test_an_experiment_of_that_name_that_is_no_slot(uri: str, schedule: Schedule) -> None:
    MlflowClient(tracking_uri=uri).create_experiment(run_name(schedule, NOON))
    with pytest.raises(SweepError, match=r"exists and is no slot of .*; rename the experiment"):
        Slots(uri).claim(schedule, NOON, NOON)


def test_all_pages_are_read(uri: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.slots._RECENT", 2)
    slots = Slots(uri)
    for hours in range(5):
        slots.claim(schedule, NOON + hours * HOUR, NOON)
    finish(slots, run_name(schedule, NOON))
    last = slots.record(schedule).last
    assert last is not None
    assert last.slot == NOON + 4 * HOUR
    assert slots.last_finished(schedule) == run_name(schedule, NOON)


def test_a_sweep_logs_into_the_experiment_of_its_slot(
    uri: str, schedule: Schedule, tmp_path: Path
) -> None:
    claim = Slots(uri).claim(schedule, NOON, NOON)
    assert claim is not None
    (tmp_path / claim.name).mkdir()
    runs = SweepRuns.open(tracked(tmp_path / claim.name, uri), TINY_SHAPE)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment(runs.experiment)
    assert runs.experiment == claim.experiment
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    database = Path(uri.removeprefix("sqlite:///"))  # not below where `due` happened to be called
    assert experiment.artifact_location == (database.parent / "mlartifacts").as_uri()
    client.set_terminated(runs.parent, "FINISHED")
    assert Slots(uri).last_finished(schedule) == claim.name


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_store_in_which_two_could_claim_a_slot(uri: str) -> None:
    with pytest.raises(SweepError, match="could be claimed twice; give a server"):
        Slots(uri)


def test_a_password_does_not_reach_the_jobs() -> None:
    with pytest.raises(SweepError, match="tracking holds a password") as error:
        Slots("http://me:secret@host:5000")
    assert "secret" not in str(error.value)


def test_a_new_tag_that_two_write_at_once(
    uri: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(uri)
    claim = slots.claim(schedule, NOON, NOON)
    assert claim is not None
    write, clashes = MlflowClient.set_experiment_tag, [1]

    def clash(client: MlflowClient, *args: str) -> None:
        write(client, *args)
        if clashes and clashes.pop():
            raise MlflowException("UNIQUE constraint failed: experiment_tags.key", 3000)

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", clash)
    slots.mark(claim, NOON + HOUR, "skipped", NOON)
    assert not clashes
    assert slots.record(schedule).skipped == {NOON + HOUR}


def test_a_store_that_does_not_answer(tmp_path: Path, schedule: Schedule) -> None:
    (tmp_path / "x.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConnectionError, match=r"x\.db', which answers: .*not a database"):
        Slots(f"sqlite:///{tmp_path}/x.db")
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9', which answers: .*refused"):
        Slots("http://127.0.0.1:9").record(schedule)


def test_a_database_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(Path(uri.removeprefix("sqlite:///")).parent)
    assert Slots("sqlite:///mlflow.db").uri == uri


CLAIMS = """
import os, sys, time
from datetime import datetime, timedelta
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # once for all
from cluster.schedules import Schedule
from cluster.slots import Slots

schedule = Schedule(name="processes", cron="0 * * * *", zone="UTC", sweep=Path("s.toml"))
start = time.time() + 0.2
for number in range(6):
    if os.fork() == 0:
        slots = Slots(sys.argv[1], host=str(number))
        for hours in range(3):
            time.sleep(max(0.0, start + 0.2 * hours - time.time()))
            slot = datetime.fromisoformat("20261125T1200Z") + timedelta(hours=hours)
            if slots.claim(schedule, slot, slot):
                os.write(1, b"%d " % hours)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(6)))
"""


def test_of_many_processes_one_claims(uri: str) -> None:
    Slots(uri)  # makes the tables
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS, uri], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "2"]
