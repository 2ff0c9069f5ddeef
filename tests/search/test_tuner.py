"""Whole sweeps on Ray, small ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from pruners import PrunableViT, ViTShape, cost_of
from pruners.training.evaluation import evaluate
from search.__main__ import main
from search.check import check
from search.data.splits import open_split
from search.records.files import read_front, read_trials
from search.records.front import cost_ratio
from search.records.front_diff import change
from search.records.journal import Journal
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep
from search.tracking.addresses import local_uri
from search.trial.worker_group import HEAD
from search.tuner import bundle, most_trials_at_once
from tests.forks.client import Forked
from tests.images import write_images
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("ray_session")


def states(directory: Path) -> list[TrialState]:
    storage = f"sqlite:///{directory / 'study.db'}"
    return [t.state for t in optuna.load_study(study_name="tiny", storage=storage).trials]


BEST_UNDER = {0.25: "best-under-25", 0.5: "best-under-50", 0.75: "best-under-75"}


def identity_of(directory: Path) -> dict[str, str]:
    events = Journal(directory / "ledger.jsonl").read()
    return next(dict(event["digests"]) for event in events if event["event"] == "identity")


def test_a_sweep_from_command_to_front(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(sweep_file), "--set", "trials=7"]
    command += ["register_front=true", 'registered_model="kept"']
    assert main(command) == 0
    shown = capsys.readouterr().out
    directory = sweep_file.parent / "results" / "tiny"
    records = read_trials(directory / "trials.parquet")
    assert [r.trial for r in records] == [f"{i:04d}" for i in range(7)]
    assert [r.status for r in records] == ["dense", *["finished"] * 6]
    origins = ["dense", *["ladder"] * 2, *["search"] * 2, *["refined"] * 2]
    assert [r.origin for r in records] == origins
    dense = records[0]
    for r in records[1:]:
        assert 0.5 <= r.effective_gmacs / dense.effective_gmacs <= 0.9
        assert [h["epoch"] for h in r.history] == [0, 1]
    assert states(directory) == [TrialState.COMPLETE] * 4  # Optuna is not asked for refined ones

    front = read_front(directory / "front.json")
    members = {m.trial: m for m in front.members}
    assert members
    assert all(m.test_top1 is not None for m in (front.dense, *front.members))
    tested = {r.trial for r in records if r.test_top1 is not None}
    assert tested == {"0000", *members}  # the test split is read for the front alone
    for name in members:
        assert name in shown
    assert f"mlflow ui --backend-store-uri sqlite:///{directory}/mlflow.db" in shown

    # Every family really acts, and what is stored is what was predicted.
    mixed = records[1]
    vit = PrunableViT.load(directory / mixed.checkpoint)
    shape = ViTShape.from_json(mixed.shape)
    assert mixed.methods == "grouped+evit+magnitude"
    assert vit.shape() == shape
    assert shape.blocks[0].hidden < 96
    assert shape.blocks[2].mlp_tokens < 25
    assert all((layer.weight == 0).any() for _, layer in vit.linears())

    client = MlflowClient(tracking_uri=local_uri(directory))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    marked = client.search_runs([experiment], "tags.front = 'true'")
    assert {run.data.tags["trial"] for run in marked} == set(members)
    assert len(client.search_runs([experiment])) == 8

    # Its front is registered, and verified; a person may approve a member.
    versions = client.search_model_versions("name = 'kept'")
    assert sorted(v.tags["trial"] for v in versions) == sorted(members)
    assert all(v.tags["verified"] == "true" for v in versions)
    assert {float(v.tags["test_top1"]) for v in versions} == {m.test_top1 for m in front.members}
    assert {v.tags["data.val"] for v in versions} == {identity_of(directory)["data.val"]}
    cheapest = cost_ratio(front, front.members[0])
    named = {alias for share, alias in BEST_UNDER.items() if cheapest <= share}
    assert client.get_registered_model("kept").aliases.keys() == named
    assert "registered as versions of kept: 1 (" in shown
    promote = ["promote", "kept", "1", "--tracking", str(directory)]
    assert main(promote) == 0
    assert "approved version 1 of kept: trial " in capsys.readouterr().out

    # Running it again shows it; another sweep of the same name is refused.
    before = (directory / "front.json").read_bytes()
    assert main(command) == 0
    assert "holds this sweep, finished" in capsys.readouterr().out
    assert (directory / "front.json").read_bytes() == before
    assert main([*command, "trials=9"]) == 2
    assert "holds another sweep of this name" in capsys.readouterr().err
    assert main(["show", str(directory)]) == 0
    assert "Front of top-1" in capsys.readouterr().out

    # A driver that was killed while it measured the front on test has no trial left to run.
    (directory / "done").unlink()
    assert main(command) == 0
    assert (directory / "front.json").read_bytes() == before
    assert len(client.search_runs([experiment])) == 8
    assert len(client.search_model_versions("name = 'kept'")) == len(members)
    assert str(client.get_registered_model("kept").aliases["approved"]) == "1"
    assert (directory / "done").exists()

    # An exported model opens and is as good as the front says.
    name = front.members[-1].trial
    out = sweep_file.parent / "exported"
    assert main(["export", str(directory), "--trial", name, "--out", str(out)]) == 0
    sweep = load_sweep(sweep_file, ["trials=7"])
    images = open_split(sweep, check(sweep)[0], "val")
    measured = evaluate(PrunableViT.load(out), images.batches(256, seed=None, augment=False))
    assert measured.top1 == members[name].val_top1
    described = json.loads((out / "shape.json").read_text())["measured"]
    assert described["test_top1"] == members[name].test_top1
    assert {"model.safetensors", "shape.json", "model.pt2", "model.onnx"} < set(os.listdir(out))


@pytest.mark.chaos
def test_trials_that_fail_are_told_and_never_enter_the_front(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["trials=4", "epochs=3", "finetune.lr=1e30", "finetune.warmup=0.0"]
    assert main(["run", str(sweep_file), "--set", *sets]) == 0
    directory = sweep_file.parent / "results" / "tiny"
    records = read_trials(directory / "trials.parquet")
    assert [r.status for r in records] == ["dense", *["failed"] * 3]
    assert all("loss is nan" in r.reason for r in records[1:])
    assert read_front(directory / "front.json").members == ()
    assert states(directory) == [TrialState.FAIL] * 3
    assert "failed, epoch" in capsys.readouterr().out
    assert main(["export", str(directory), "--trial", "0001", "--out", "x"]) == 2
    assert "trial 0001 is failed; give one that finished" in capsys.readouterr().err


def test_an_error_in_the_dense_trial_ends_the_sweep_by_name(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(sweep_file.parent / "val.parquet", [b"no image"] * 8, [0, 1, 2, 3, 4, 0, 1, 2])
    sets = ["trials=2", "max_failures=0"]
    assert main(["run", str(sweep_file), "--set", *sets]) == 1
    shown = capsys.readouterr()
    assert "the dense model could not be measured: " in shown.err
    assert "0000 dense: failed" in shown.out


def test_more_than_the_cluster_has_is_refused(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(sweep_file), "--set", "resources.gpu=1"]) == 2
    assert "no node of this cluster has" in capsys.readouterr().err
    assert not (sweep_file.parent / "results" / "tiny").exists()


@pytest.mark.timeout(300)
@pytest.mark.chaos
def test_ctrl_c_ends_cleanly_and_the_same_command_continues(sweep_file: Path) -> None:
    directory = sweep_file.parent / "results" / "tiny"
    command = [sys.executable, "-m", "search", "run", str(sweep_file), "--set", "trials=6"]
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (directory / "front.json").exists():
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "interrupted after " in said
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    assert not (directory / "done").exists()
    ended = {r.trial: r for r in read_trials(directory / "trials.parquet")}
    again = Forked(command[1:], environment, ROOT)
    said, _ = again.communicate(timeout=150)
    assert again.returncode == 0, said
    records = {r.trial: r for r in read_trials(directory / "trials.parquet")}
    assert [r.status for r in records.values()] == ["dense", *["finished"] * 5]
    for name, record in ended.items():
        if record.status != "running":
            assert records[name].seconds == record.seconds  # not run again


def test_a_front_is_confirmed_and_trained_long(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["trials=6", "confirm=2", "final_epochs=2", "elastic_epochs=1"]
    sets += ['steps=[{method="grouped"}, {method="tome"}]', "halving={first=0, eta=2}"]
    assert main(["run", str(sweep_file), "--set", *sets]) == 0
    shown = capsys.readouterr().out
    assert "elastic start: tuned in " in shown
    directory = sweep_file.parent / "results" / "tiny"
    records = read_trials(directory / "trials.parquet")
    short = {r.trial: r for r in records if r.origin not in ("dense", "confirm", "final")}
    assert len(short) == 5
    assert {r.status for r in short.values()} <= {"finished", "stopped"}
    confirmed = {r.of for r in records if r.origin == "confirm"}
    long = [r for r in records if r.origin == "final"]
    assert confirmed
    for name in confirmed:
        runs = [r for r in records if r.of == name and r.origin == "confirm"]
        assert [r.seed for r in runs] == [1, 2]
        assert all(r.plan == short[name].plan and r.epochs == 1 for r in runs)
        assert (
            len({r.history[1]["train_loss"] for r in runs} | {short[name].history[1]["train_loss"]})
            == 3
        )
    assert {r.of for r in long} <= confirmed
    assert all((r.epochs, r.status) == (2, "finished") for r in long)
    front = read_front(directory / "front.json")
    for member in front.members:
        if member.epochs == 1:
            tops = [r.val_top1 for r in records if r.of == member.trial and r.epochs == 1]
            assert member.val_top1 == pytest.approx(sum(tops) / 2)
            assert member.runs == 3
        assert member.test_top1 is not None


def test_a_sweep_starts_from_an_earlier_front_within_its_constraints(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(sweep_file), "--set", "trials=4"]) == 0
    results = sweep_file.parent / "results"
    earlier = read_front(results / "tiny" / "front.json")
    sets = [f'start_from="{results / "tiny"}"', 'name="second"', "trials=10", "seed=1"]
    params = check(load_sweep(sweep_file))[0].shape()
    most = int(0.8 * cost_of(params).params)
    sets += [f"constraints.max_params={most}", "constraints.max_drop=90", 'cost="gmacs"']
    capsys.readouterr()
    code = main(["run", str(sweep_file), "--set", *sets])
    changed = change(earlier, read_front(results / "second" / "front.json"))
    assert code == (3 if changed.is_worse else 0)
    assert f"Against {results / 'tiny'}: {changed.describe()}" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=local_uri(results / "second"))
    experiment = client.get_experiment_by_name("second").experiment_id
    (parent,) = client.search_runs([experiment], "tags.sweep = 'second'")
    assert parent.data.metrics["hypervolume_before"] == pytest.approx(changed.before)
    assert parent.data.metrics["hypervolume_after"] == pytest.approx(changed.after)
    assert parent.data.metrics["points_gained"] == len(changed.gained)
    assert parent.data.metrics["points_lost"] == len(changed.lost)
    assert changed.describe() in parent.data.tags["mlflow.note.content"]
    records = read_trials(results / "second" / "trials.parquet")
    started = [r for r in records if r.origin == "earlier"]
    assert {json.dumps(r.parameters, sort_keys=True) for r in started} <= {
        json.dumps(m.parameters, sort_keys=True) for m in earlier.members
    }
    for r in records[1:]:
        assert (r.params > most) == ("max_params" in r.violates)
    assert all(m.params <= most for m in read_front(results / "second" / "front.json").members)
    assert main(["run", str(sweep_file), "--set", 'name="third"', 'start_from="nowhere"']) == 2
    assert "start_from: nowhere/front.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "room"),
    [
        ("{cpu=1}", 16 + 4),
        ("{cpu=3}", 5 + 1),
        ("{cpu=2, gpu=1}", 2),
        ("{cpu=2, gpu=0.5}", 4),
        ("{cpu=8, gpu=0.25}", 2),
        ("{cpu=3, workers=4}", 1),  # five of them on the first node, one on the other
        ("{cpu=3, workers=2}", 3),
        ("{cpu=2, gpu=1, workers=2}", 1),
    ],
)
def test_room_is_counted_node_by_node(
    resources: str, room: int, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    sweep = load_sweep(sweep_file, [f"resources={resources}"])
    assert most_trials_at_once(sweep) == room
    too_many = load_sweep(sweep_file, ["resources={cpu=2, gpu=1, workers=3}"])
    with pytest.raises(SweepError, match=r"3 workers of .* room for 2; give less, .*workers=2"):
        most_trials_at_once(too_many)


def test_a_trials_resources_are_ray_resources(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["resources={cpu=1, gpu=0.5}"])
    assert bundle(sweep) == {"CPU": 1.0, "GPU": 0.5}
    assert bundle(load_sweep(sweep_file)) == {"CPU": 1.0}
    shared = load_sweep(sweep_file, ["resources={cpu=1, gpu=1, workers=2}"])
    assert bundle(shared) == HEAD  # else the GPUs of its workers would be asked for twice
