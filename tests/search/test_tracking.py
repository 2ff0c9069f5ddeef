from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search.results import Front, TrialRecord, build_front
from search.tracking import Tracker, local_uri, trial_params, ui_command
from tests.search.test_results import DENSE, record

SHAPE = {
    "dim": 8,
    "blocks": [{"tokens": 5, "mlp_tokens": 5, "heads": 2, "qk_dim": 4, "v_dim": 4, "hidden": 16}],
    "nonzero": {},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def client(directory: Path) -> MlflowClient:
    """One whole sweep, tracked; the tests look at what is there."""
    dense = dataclasses.replace(DENSE, shape=SHAPE)
    first, second, third = (
        record(f"000{i}", cost, top1, shape=SHAPE)
        for i, (cost, top1) in enumerate(((0.6, 60.0), (0.5, 70.0), (0.3, 40.0)), 1)
    )
    failed = record("0004", 0.4, None, "failed", reason="epoch 1: loss is nan")
    tracker = Tracker.open(None, directory, "my sweep", 'name = "my sweep"\n')
    for r in (dense, first):
        tracker.start_trial(r)
        for epoch in range(3):
            tracker.epoch(r.trial, epoch, {"val_top1": 50.0 + epoch, "gmacs": 0.5})
        tracker.finish_trial(r)
    front = build_front([dense, first], "effective_gmacs")
    tracker.front_grew(front, 2)
    tracker.update_front(front, [dense, first])
    tracker.wait()
    # The driver dies and starts again: the same runs go on.
    again = Tracker.open(None, directory, "my sweep", "")
    for r in (second, third, failed):
        again.start_trial(r)
        again.finish_trial(r)
    records = [dense, first, second, third, failed]
    front = build_front(records, "effective_gmacs")
    again.front_grew(front, 5)
    again.update_front(front, records)
    tested = [dataclasses.replace(r, test_top1=r.val_top1) for r in records]
    again.close(build_front(tested, "effective_gmacs"), tested)
    return MlflowClient(tracking_uri=local_uri(directory))


def runs(client: MlflowClient, query: str = "") -> dict[str, object]:
    experiment = client.get_experiment_by_name("my sweep")
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], query)}


def test_a_parent_and_its_children(client: MlflowClient) -> None:
    found = runs(client)
    assert len(found) == 6
    parent = found.pop("my sweep")
    assert {r.data.tags["mlflow.parentRunId"] for r in found.values()} == {parent.info.run_id}
    assert "0002 grouped 0.50x" in found


def test_every_epoch_is_logged_once(client: MlflowClient) -> None:
    run = runs(client)["0001 grouped 0.60x"]
    history = client.get_metric_history(run.info.run_id, "val_top1")
    assert [(m.step, m.value) for m in history] == [(0, 50.0), (1, 51.0), (2, 52.0)]


def test_members_of_the_front_are_found_by_a_filter(client: MlflowClient) -> None:
    assert set(runs(client, "tags.front = 'true'")) == {"0002 grouped 0.50x", "0003 grouped 0.30x"}
    assert set(runs(client, "tags.status = 'failed'")) == {"0004 grouped 0.40x"}
    failed = runs(client)["0004 grouped 0.40x"]
    assert (failed.info.status, failed.data.tags["reason"]) == ("FAILED", "epoch 1: loss is nan")


def test_params_are_readable(client: MlflowClient) -> None:
    params = runs(client)["0002 grouped 0.50x"].data.params
    assert params["methods"] == "grouped"
    assert params["grouped.mlp.neuron.mean_share"] == "0.5000"
    assert params["plan"] == "grouped: neurons -50 %"


def test_the_parent_holds_the_front(client: MlflowClient, directory: Path) -> None:
    parent = runs(client)["my sweep"]
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert [m.step for m in history] == [2, 5]
    assert [m.value for m in history] == pytest.approx([0.4 * 0.6, 0.5 * 0.7 + 0.2 * 0.4])
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert names == {"sweep.toml", "front.json", "front.html", "front.png", "kept.png"}
    front = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "front.json")).read_text()
    )
    assert [m["trial"] for m in front["front"]] == ["0003", "0002"]
    assert [m["test_top1"] for m in front["front"]] == [40.0, 70.0]
    assert "| 0002 grouped 0.50x | 70.0 | 70.0 |" in parent.data.tags["mlflow.note.content"]
    assert parent.info.status == "FINISHED"


def test_the_plan_is_kept_as_json(client: MlflowClient) -> None:
    run = runs(client)["0001 grouped 0.60x"]
    plan = json.loads(Path(client.download_artifacts(run.info.run_id, "plan.json")).read_text())
    assert plan == record("0001", 0.6, 60.0).plan


def test_runs_of_trials_that_a_killed_driver_lost_are_replaced(tmp_path: Path) -> None:
    """Ray's snapshot is older than the kill: it asks for a trial anew that has a run already."""
    first = record("0001", 0.6, 60.0)
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    for trial in (DENSE, first):
        tracker.start_trial(trial)
        tracker.epoch(trial.trial, 0, {"val_top1": 1.0})
    tracker.wait()
    tracker.notes.append = lambda line: None  # type: ignore[method-assign]  # killed before it
    tracker.start_trial(record("0002", 0.5, 70.0))
    tracker.wait()

    again = Tracker.open(None, tmp_path, "my sweep", "")
    another = dataclasses.replace(first, plan_line="another plan")
    again.start_trial(another)
    again.epoch("0001", 0, {"val_top1": 2.0})
    again.wait()
    found = runs(MlflowClient(tracking_uri=local_uri(tmp_path)))
    assert set(found) == {"my sweep", DENSE.name, first.name}
    assert found[first.name].data.params["plan"] == "another plan"
    assert found[first.name].data.metrics["val_top1"] == 2.0
    assert len(again.client.search_runs([again.experiment])) == 3


def test_a_note_that_was_not_written_to_its_end_is_none(tmp_path: Path) -> None:
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    for trial in (DENSE, record("0001", 0.6, 60.0)):
        tracker.start_trial(trial)
    tracker.wait()
    noted = tmp_path / "mlflow.jsonl"
    noted.write_bytes(noted.read_bytes()[:-3])
    again = Tracker.open(None, tmp_path, "my sweep", "")
    assert set(again.trials) == {DENSE.trial}
    again.start_trial(record("0001", 0.5, 60.0))
    again.wait()
    assert set(runs(again.client)) == {"my sweep", DENSE.name, "0001 grouped 0.50x"}
    assert Tracker.open(None, tmp_path, "my sweep", "").trials == again.trials


def test_the_tags_of_a_front_follow_it_past_a_killed_driver(tmp_path: Path) -> None:
    shaped = dataclasses.replace(DENSE, shape=SHAPE)
    first, better = (record(f"000{i}", 0.5, 50.0 + i, shape=SHAPE) for i in (1, 2))
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    for r in (shaped, first):
        tracker.start_trial(r)
    tracker.update_front(build_front([shaped, first], "effective_gmacs"), [shaped, first])
    tracker.wait()
    again = Tracker.open(None, tmp_path, "my sweep", "")
    again.start_trial(better)
    records = [shaped, first, better]
    again.update_front(build_front(records, "effective_gmacs"), records)
    again.wait()
    assert set(runs(again.client, "tags.front = 'true'")) == {better.name}
    # A member whose trial is lost and runs again is marked again when it is back.
    lost = Tracker.open(None, tmp_path, "my sweep", "")
    lost.start_trial(better)
    lost.update_front(build_front(records, "effective_gmacs"), records)
    lost.wait()
    assert set(runs(lost.client, "tags.front = 'true'")) == {better.name}


def test_times_are_those_at_which_a_trial_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    release = threading.Event()
    tracker.background.call(release.wait)  # all that follows is written late
    for seconds, log in (
        (1000, lambda: tracker.start_trial(DENSE)),
        (1001, lambda: tracker.epoch("0000", 0, {"val_top1": 1.0})),
        (1002, lambda: tracker.finish_trial(DENSE)),
    ):
        monkeypatch.setattr("search.tracking.time.time", lambda now=seconds: now)
        log()
    monkeypatch.undo()
    release.set()
    tracker.wait()
    run = tracker.client.get_run(tracker.trials["0000"])
    history = tracker.client.get_metric_history(run.info.run_id, "val_top1")
    assert (run.info.start_time, run.info.end_time) == (1_000_000, 1_002_000)
    assert [m.timestamp for m in history] == [1_001_000]


def test_what_mlflow_refuses_is_raised(tmp_path: Path) -> None:
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    tracker.start_trial(DENSE)
    tracker.epoch("0000", 0, {"a key:that MLflow refuses?": 1.0})
    with pytest.raises(MlflowException, match="a key:that MLflow refuses"):
        tracker.wait()
    with pytest.raises(MlflowException, match="a key:that MLflow refuses"):
        tracker.finish_trial(DENSE)


def test_pictures_are_drawn_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front changes with each trial; a picture takes long."""
    drawn: list[int] = []
    now = [0.0]

    def slowly(front: Front, records: Sequence[TrialRecord]) -> str:
        drawn.append(len(records))
        now[0] += 10.0
        return ""

    monkeypatch.setattr("search.tracking.front_html", slowly)
    tracker = Tracker.open(None, tmp_path, "my sweep", "")
    monkeypatch.setattr("search.tracking.time.monotonic", lambda: now[0])
    records = [dataclasses.replace(DENSE, shape=SHAPE)]
    tracker.start_trial(records[0])
    for number, later in enumerate((0.0, 100.0, 89.0, 2.0), 1):
        now[0] += later
        records.append(record(f"{number:04d}", 1.0 - 0.1 * number, 50.0, shape=SHAPE))
        tracker.start_trial(records[-1])
        tracker.update_front(build_front(records, "effective_gmacs"), list(records))
        tracker.wait()
    assert drawn == [2, 5]  # 190 s after the first, which took 10 s
    tracker.close(build_front(records, "effective_gmacs"), records)
    assert drawn == [2, 5, 5]


def test_params_stay_within_what_mlflow_takes() -> None:
    thresholds = {f"blocks.{i}.attn.head{i}": 0.5 for i in range(300)}
    steps = [{"method": "grouped", "options": {}, "thresholds": thresholds}]
    many = record("0001", 0.6, 60.0, plan={"steps": steps}, plan_line="x" * 9000)
    params = trial_params(many)
    assert max(map(len, params.values())) <= 500


def test_ui_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = "mlflow ui --backend-store-uri sqlite:///results/a/mlflow.db"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert ui_command(None, Path("results/a")) == ends
    monkeypatch.setattr("shutil.which", lambda name: None)
    command = ui_command(None, Path("results/a"))
    assert command.endswith(f"/{ends}")
    assert Path(command.split()[0]).exists()
    assert ui_command("http://tracker:5000", Path("results/a")) == "http://tracker:5000"
