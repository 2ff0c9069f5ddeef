from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.records.front import build_front
from search.records.journal import Journal
from search.sweep.spec import SweepFailedError
from search.tracking import tracker as tracker_module
from search.tracking.runs import SweepRuns
from search.tracking.tracker import Tracker
from tests.search import trial_records
from tests.search.flaky import flaky
from tests.search.logged import SHAPE, asked, ended, epoch, opened
from tests.search.trial_records import record

pytestmark = pytest.mark.slow  # stores of MLflow are opened for real

DENSE = dataclasses.replace(trial_records.DENSE, shape=SHAPE)
FIRST = record("0001", 0.6, 60.0, shape=SHAPE)
FRONT = build_front([DENSE, FIRST], "effective_gmacs")
EVENTS = [
    {"event": "began", "time": 0},
    asked(DENSE),
    *(epoch(DENSE, n, 70.0 + n) for n in range(3)),
    ended(DENSE, 1, 0.0),
    asked(FIRST),
    *(epoch(FIRST, n, 50.0 + n) for n in range(3)),
    ended(FIRST, 2, 0.24),
]


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "POLL_S"):
        monkeypatch.setattr(tracker_module, name, 0.01)
    one = Tracker(opened(tmp_path), Journal(tmp_path / "ledger.jsonl"))
    yield one
    one.close()


def write(tracker: Tracker, events: list[dict[str, Any]]) -> None:
    for event in events:
        tracker.ledger.append(event)


def histories(runs: SweepRuns) -> dict[str, list[tuple[int, float]]]:
    """Trial -> (epoch, top-1) as logged; the parent's hypervolume."""
    found = {}
    for run in runs.client.search_runs([runs.experiment]):
        key = "val_top1" if "trial" in run.data.tags else "hypervolume"
        history = runs.client.get_metric_history(run.info.run_id, key)
        found[run.data.tags.get("trial", "")] = [(m.step, m.value) for m in history]
    return found


WHOLE = {
    "": [(1, 0.0), (2, 0.24)],
    "0000": [(n, 70.0 + n) for n in range(3)],
    "0001": [(n, 50.0 + n) for n in range(3)],
}


def test_what_happens_is_logged_while_it_happens(tracker: Tracker) -> None:
    for event in EVENTS:
        write(tracker, [event])
        assert tracker.wait(10.0)
    assert histories(tracker.runs) == WHOLE
    assert tracker.trouble == ""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["create_run", "log_batch", "log_dict", "set_terminated"])
def test_what_fails_is_tried_until_it_is_there_once(
    method: str, after: bool, tracker: Tracker
) -> None:
    client = tracker.runs.client
    setattr(client, method, flaky(getattr(client, method), after=after))
    write(tracker, EVENTS)
    assert tracker.wait(30.0)
    assert histories(tracker.runs) == WHOLE
    ends = {r.info.status for r in client.search_runs([tracker.runs.experiment])}
    assert ends == {"FINISHED", "RUNNING"}  # the parent goes on


def test_nobody_waits_while_mlflow_is_away(tracker: Tracker) -> None:
    write(tracker, EVENTS[:3])
    assert tracker.wait(10.0)
    client = tracker.runs.client
    works, away = client.log_batch, [True]

    def log_batch(*args: Any, **more: Any) -> None:
        if away[0]:
            raise ConnectionError("no route to host\n  and more")
        works(*args, **more)

    client.log_batch = log_batch
    start = time.monotonic()
    write(tracker, EVENTS[3:])
    tracker.show(FRONT, [DENSE, FIRST])
    assert time.monotonic() - start < 1.0
    assert not tracker.wait(0.3)
    assert tracker.trouble == "no route to host"
    away[0] = False
    assert tracker.wait(10.0)
    assert tracker.trouble == ""
    assert histories(tracker.runs) == WHOLE
    marked = client.search_runs([tracker.runs.experiment], "tags.front = 'true'")
    assert [run.data.tags["trial"] for run in marked] == ["0001"]


def test_the_latest_front_is_shown_when_its_trials_are_there(tracker: Tracker) -> None:
    shown: list[tuple[float, int]] = []
    tracker.runs.show = lambda front, records: shown.append(  # type: ignore[method-assign]
        (front.hypervolume, len(tracker.runs.trials))
    )
    write(tracker, EVENTS)
    for _ in range(5):
        tracker.show(build_front([DENSE], "effective_gmacs"), [DENSE])
    tracker.show(FRONT, [DENSE, FIRST])
    assert tracker.wait(10.0)
    assert shown[-1] == (FRONT.hypervolume, 2)
    assert len(shown) <= 2


def test_a_sweep_ends_when_all_is_logged(tracker: Tracker) -> None:
    write(tracker, EVENTS)
    tracker.finish(FRONT, [DENSE, FIRST], seconds=30.0)
    parent = tracker.runs.client.get_run(tracker.runs.parent)
    assert parent.info.status == "FINISHED"
    assert histories(tracker.runs) == WHOLE


def test_a_sweep_that_cannot_be_logged_says_how_it_goes_on(tracker: Tracker) -> None:
    def log_batch(*args: Any, **more: Any) -> None:
        raise ConnectionError("no route to host")

    tracker.runs.client.log_batch = log_batch
    write(tracker, EVENTS)
    with pytest.raises(SweepFailedError, match=r"\(no route to host\); the front is in .*again"):
        tracker.finish(FRONT, [DENSE, FIRST], seconds=0.3)


@pytest.mark.parametrize("method", ["set_tag", "log_dict"])
def test_a_front_is_shown_whole_however_often_that_fails(method: str, tracker: Tracker) -> None:
    client = tracker.runs.client
    write(tracker, EVENTS)
    assert tracker.wait(10.0)
    works, fails = getattr(client, method), [True, True]

    def once(*args: Any, **more: Any) -> None:
        if fails and fails.pop():
            raise ConnectionError("no route to host")
        works(*args, **more)

    setattr(client, method, once)
    tracker.show(FRONT, [DENSE, FIRST])
    assert tracker.wait(10.0)
    parent = client.get_run(tracker.runs.parent)
    assert FIRST.name in parent.data.tags["mlflow.note.content"]
    assert "front.json" in {f.path for f in client.list_artifacts(tracker.runs.parent)}


def test_a_mistake_of_ours_is_raised_and_not_tried_again(tracker: Tracker) -> None:
    tries: list[int] = []

    def log(event: dict[str, Any], place: int) -> None:
        tries.append(place)
        raise ZeroDivisionError("ours")

    tracker.runs.log = log  # type: ignore[method-assign]
    write(tracker, EVENTS)
    with pytest.raises(ZeroDivisionError, match="ours"):
        tracker.wait(10.0)
    assert len(tries) == 1
