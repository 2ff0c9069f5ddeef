from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from search.records.front import build_front
from search.sweep.spec import SweepError
from search.tracking.addresses import local_uri, ui_command
from search.tracking.params import trial_params
from search.tracking.runs import SweepRuns
from tests.search.logged import SHAPE, TINY_SHAPE, asked, ended, epoch, log, opened, tracked
from tests.search.trial_records import DENSE, record

pytestmark = pytest.mark.slow  # stores of MLflow are opened for real


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("my-sweep")


@pytest.fixture(scope="module")
def client(directory: Path) -> MlflowClient:
    """One whole sweep, logged; the tests look at what is there."""
    dense = dataclasses.replace(DENSE, shape=SHAPE)
    first, second, third = (
        record(f"000{i}", cost, top1, shape=SHAPE)
        for i, (cost, top1) in enumerate(((0.6, 60.0), (0.5, 70.0), (0.3, 40.0)), 1)
    )
    failed = record("0004", 0.4, None, "failed", reason="epoch 1: loss is nan")
    sweep_runs = opened(directory)
    learned = {"method": "uvc", "report": {"seconds": 12.0}}
    log(sweep_runs, [{"event": "began", "time": 0}])
    log(sweep_runs, [{"event": "learned", "time": 7, "runs": [learned, learned]}])
    log(sweep_runs, [{"event": "elastic", "time": 8, "run": {"epochs": 4}}])
    for count, r in enumerate((dense, first), 1):
        log(sweep_runs, [asked(r), *(epoch(r, n, 50.0 + n) for n in range(3))])
        log(sweep_runs, [ended(r, count, None if count == 1 else 0.24)])
    sweep_runs.show(build_front([dense, first], "effective_gmacs"), [dense, first])
    # The driver dies and starts again: the same runs go on.
    again = opened(directory)
    for count, r in enumerate((second, third, failed), 3):
        log(again, [asked(r), ended(r, count, 0.2 + 0.01 * count)])
    records = [dense, first, second, third, failed]
    again.show(build_front(records, "effective_gmacs"), records)
    tested = [dataclasses.replace(r, test_top1=r.val_top1) for r in records]
    for _ in range(2):  # its answer was lost
        again.close(build_front(tested, "effective_gmacs"), tested)
        again.again = True
    return MlflowClient(tracking_uri=local_uri(directory))


def runs(client: MlflowClient, query: str = "", experiment: str = "my-sweep0") -> dict[str, object]:
    experiment = client.get_experiment_by_name(experiment)
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], query)}


def test_a_parent_and_its_children(client: MlflowClient) -> None:
    found = runs(client)
    assert len(found) == 6
    parent = found.pop("my-sweep0")
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
    parent = runs(client)["my-sweep0"]
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert [(m.step, round(m.value, 2)) for m in history] == [
        *((2, 0.24), (3, 0.23), (4, 0.24), (5, 0.25))
    ]
    assert parent.data.metrics["learning_seconds"] == 24.0
    assert parent.data.params["steps"] == "grouped"
    assert parent.data.params["budget"] == "0.3 to 0.9"
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert names == {
        *("sweep.toml", "learned.json", "elastic.json"),
        *("front.json", "front.html", "front.png", "hypervolume.png", "kept.png", "methods.png"),
    }
    front = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "front.json")).read_text()
    )
    assert [m["trial"] for m in front["front"]] == ["0003", "0002"]
    assert [m["test_top1"] for m in front["front"]] == [40.0, 70.0]
    member = runs(client)["0002 grouped 0.50x"].info
    link = f"#/experiments/{member.experiment_id}/runs/{member.run_id}"
    note = parent.data.tags["mlflow.note.content"].replace("\u2002", "")
    assert f"| [0002]({link}) | 70.0 | 70.0 |" in note
    assert "| failed | 1 | epoch 1: loss is nan |" in note
    assert parent.info.status == "FINISHED"


def test_the_plan_is_kept_as_json(client: MlflowClient) -> None:
    run = runs(client)["0001 grouped 0.60x"]
    plan = json.loads(Path(client.download_artifacts(run.info.run_id, "plan.json")).read_text())
    assert plan == record("0001", 0.6, 60.0).plan


def test_the_plan_is_kept_as_a_picture(client: MlflowClient) -> None:
    run = runs(client)["0001 grouped 0.60x"]
    path = Path(client.download_artifacts(run.info.run_id, "plan.png"))
    assert np.asarray(Image.open(path).convert("L")).std() > 5  # not blank
    assert path.stat().st_size < 1_000_000


def test_the_dense_models_test_accuracy_is_not_logged_twice(client: MlflowClient) -> None:
    run = runs(client)["0002 grouped 0.50x"]
    history = client.get_metric_history(run.info.run_id, "test_top1")
    assert [m.value for m in history] == [70.0]


ALL = [
    {"event": "learned", "time": 7, "runs": [{"report": {"seconds": 12.0}}]},
    asked(DENSE),
    epoch(DENSE, 0, 77.0),
    ended(DENSE, 1, 0.0),
    asked(first := record("0001", 0.6, 60.0)),
    epoch(first, 0, 50.0),
    epoch(first, 1, 60.0),
    ended(first, 2, 0.24),
]


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("place", range(len(ALL)))
def test_what_was_logged_without_a_note_is_not_logged_again(
    place: int, noted: bool, tmp_path: Path
) -> None:
    """A driver is killed between MLflow and its note, or between the first note and the last."""
    sweep_runs = opened(tmp_path)
    log(sweep_runs, ALL[:place])
    if noted:
        append = sweep_runs.notes.append
        sweep_runs.notes.append = lambda line: append(line) if "trial" in line else None  # type: ignore[method-assign]
    else:
        sweep_runs.notes.append = lambda line: None  # type: ignore[method-assign]
    log(sweep_runs, [ALL[place]])
    again = opened(tmp_path)
    assert again.place == place
    log(again, ALL[place:])
    client = MlflowClient(tracking_uri=local_uri(tmp_path))
    found = client.search_runs([again.experiment])
    assert len(found) == 3
    for run in found:
        for key in run.data.metrics:
            steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps))
    by_trial = {run.data.tags.get("trial"): run for run in found}
    assert {t: r.info.run_id for t, r in by_trial.items() if t} == again.trials
    assert by_trial["0001"].data.metrics["val_top1"] == 60.0
    assert by_trial["0001"].data.tags["status"] == "finished"
    assert opened(tmp_path).place == len(ALL)


def test_times_are_those_of_the_events(tmp_path: Path) -> None:
    sweep_runs = opened(tmp_path)
    events = [asked(DENSE, 1_000_000), epoch(DENSE, 0, 77.0, 1_001_000)]
    log(sweep_runs, [*events, ended(DENSE, 1, None, 1_002_000)])
    run = sweep_runs.client.get_run(sweep_runs.trials["0000"])
    history = sweep_runs.client.get_metric_history(run.info.run_id, "val_top1")
    assert (run.info.start_time, run.info.end_time) == (1_000_000, 1_002_000)
    assert [m.timestamp for m in history] == [1_001_000]


def test_the_tags_of_a_front_follow_it_past_a_killed_driver(tmp_path: Path) -> None:
    shaped = dataclasses.replace(DENSE, shape=SHAPE)
    first, better = (record(f"000{i}", 0.5, 50.0 + i, shape=SHAPE) for i in (1, 2))
    sweep_runs = opened(tmp_path)
    log(sweep_runs, [asked(shaped), asked(first)])
    sweep_runs.show(build_front([shaped, first], "effective_gmacs"), [shaped, first])
    again = opened(tmp_path)
    log(again, [asked(better)])
    records = [shaped, first, better]
    again.show(build_front(records, "effective_gmacs"), records)
    assert set(runs(again.client, "tags.front = 'true'", tmp_path.name)) == {better.name}


def test_artifacts_do_not_go_where_a_driver_happens_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, sweep = (tmp_path / name for name in ("here", "there", "sweep"))
    for directory in (here, there, sweep):
        directory.mkdir()
    monkeypatch.chdir(here)
    tracking = f"sqlite:///{there}/mlflow.db"
    sweep_runs = SweepRuns.open(tracked(sweep, tracking), TINY_SHAPE)
    log(sweep_runs, [asked(dataclasses.replace(DENSE, shape=SHAPE))])
    experiment = sweep_runs.client.get_experiment_by_name("sweep")
    assert experiment.artifact_location == (there / "mlartifacts").as_uri()
    assert list((there / "mlartifacts").rglob("plan.json"))
    assert not list(here.iterdir())


def test_what_mlflow_refuses_is_raised(tmp_path: Path) -> None:
    sweep_runs = opened(tmp_path)
    log(sweep_runs, [asked(DENSE)])
    sweep_runs.client.delete_run(sweep_runs.trials["0000"])
    with pytest.raises(MlflowException, match="must be in the 'active' state"):
        log(sweep_runs, [epoch(DENSE, 0, 77.0)])


def test_a_server_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"tracking = 'http://127\.0\.0\.1:9': .*give a server"):
        SweepRuns.open(tracked(tmp_path, "http://127.0.0.1:9"), TINY_SHAPE)


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
