"""Methods that learn once per sweep, on Ray."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from pruners import Plan, PrunableViT, load_method
from pruners.families.learned import Learned, LearnedPruner
from pruners.families.pruner import method_names
from search.__main__ import main
from search.check import check
from search.data.splits import calibration_batches, open_split
from search.prepare.learning import FOLDER, learn_all, learn_once, learning_digest
from search.records.files import read_front, read_trials
from search.sweep.spec import SweepFailedError
from search.sweep.toml import load_sweep
from search.tracking.addresses import local_uri

QUICK = 'steps=[{method="x_pruner", mask_epochs=1, epochs=1}, {method="evit"}]'
LEARNERS = [name for name in method_names() if isinstance(load_method(name), LearnedPruner)]


def splits(sweep, dense):
    return [open_split(sweep, dense, split) for split in ("train", "val")]


def test_what_is_learned_is_found_again_and_anything_decisive_changes_its_name(
    sweep_file: Path, tmp_path: Path
) -> None:
    sweep = load_sweep(sweep_file, [QUICK])
    dense, space = check(sweep)
    method = load_method("x_pruner", mask_epochs=1, epochs=1)
    (first, own), (again, own_again) = (
        learn_once(sweep, dense, space.steps[0], method, tmp_path / "a") for _ in range(2)
    )
    assert all((own.shares[site] == own_again.shares[site]).all() for site in own.shares)
    assert (first.reused, again.reused) == (False, True)
    assert (again.path, again.report) == (first.path, first.report)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [Path(first.path).name]
    assert "x_pruner for 0.50x: learned in" in first.describe()
    assert "learned before" in again.describe()

    train, val = splits(sweep, dense)
    names = {learning_digest(sweep, dense, method, train, val)}
    names.add(learning_digest(sweep, dense, dataclasses.replace(method, lr=1e-3), train, val))
    names.add(learning_digest(sweep, dense, method, val, val))
    for changed in ("seed=1", "data.batch_size=8", "finetune.augment=false"):
        names.add(
            learning_digest(load_sweep(sweep_file, [QUICK, changed]), dense, method, train, val)
        )
    with torch.no_grad():
        dense.vit.head.bias[0] += 1e-6
    names.add(learning_digest(sweep, dense, method, train, val))
    assert len(names) == 7


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(sweep_file, [QUICK])
    dense, space = check(sweep)
    step, method = space.steps[0], load_method("x_pruner", mask_epochs=2, epochs=1)

    def learn(folder: str) -> Learned:
        run, _ = learn_once(sweep, dense, step, method, tmp_path / folder)
        return Learned.load(Path(run.path))

    whole = learn("a")
    stages = type(method).learner
    begun: list[int] = []

    def learner(self, vit, data):
        run = stages(self, vit, data)
        begin = run.begin_epoch

        def stopping(epoch: int) -> None:
            begun.append(epoch)
            if epoch == 1 and len(begun) == 2:
                raise KeyboardInterrupt
            begin(epoch)

        run.begin_epoch = stopping
        return run

    monkeypatch.setattr(type(method), "learner", learner)
    with pytest.raises(KeyboardInterrupt):
        learn("b")
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".part"]
    resumed = learn("b")
    assert begun == [0, 1, 1, 2]
    assert all(torch.equal(resumed.scores[s], whole.scores[s]) for s in whole.scores)
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".safetensors"]


@pytest.mark.usefixtures("ray_session")
def test_what_is_still_learning_is_said(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.prepare.learning.HEARTBEAT_S", 0.05)
    sweep = load_sweep(sweep_file, [QUICK])
    dense, space = check(sweep)
    runs, heard = [], []
    rungs = learn_all(sweep, dense, space.steps, runs.append, heard.append)
    assert heard
    assert all(set(labels) <= {"x_pruner", "evit"} for labels in heard)
    assert any("x_pruner" in labels for labels in heard)
    assert {run.label: run.learns for run in runs} == {"x_pruner": True, "evit": False}
    assert set(rungs) == {"x_pruner", "evit"}
    assert (rungs["x_pruner"][0].path != "", rungs["evit"][0].path) == (True, "")


def test_scores_of_the_dense_model_are_kept_like_what_is_learned(
    sweep_file: Path, tmp_path: Path
) -> None:
    sweep = load_sweep(sweep_file, ['steps=[{method="grouped"}]'])
    dense, space = check(sweep)
    (step,) = space.steps
    (first, _), (again, _) = (
        learn_once(sweep, dense, step, step.pruner, tmp_path) for _ in range(2)
    )
    assert (first.reused, again.reused, first.path) == (False, True, again.path)
    assert first.describe().startswith("grouped: scored in ")
    batches = list(calibration_batches(sweep, open_split(sweep, dense, "train"), "cpu"))
    expected = step.pruner.score(dense, batches)
    scores = Learned.load(Path(first.path)).scores
    assert all(torch.equal(scores[site], expected[site]) for site in expected)


@pytest.mark.usefixtures("ray_session")
def test_a_failed_run_ends_the_sweep_by_name(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ['steps=[{method="x_pruner", classes=[7]}]', "max_failures=0"])
    dense, space = check(sweep)
    with pytest.raises(SweepFailedError, match=r"x_pruner could not learn: .*classes.* has 7"):
        learn_all(sweep, dense, space.steps, lambda run: None, lambda labels: None)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_over_all_that_learn(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every learning method proposes first trials of its own; they share one front."""
    extra = {"x_pruner": ", mask_epochs=1, budgets=[0.6, 0.8]"}
    steps = [f'{{method="{name}", epochs=1{extra.get(name, "")}}}' for name in LEARNERS]
    trials = 1 + 2 + 2 * (len(LEARNERS) + 1) + 4  # first plans, each method alone at two budgets
    sets = [f'steps=[{", ".join(steps)}, {{method="magnitude"}}]', f"trials={trials}", "alone=2"]
    assert main(["run", str(sweep_file), "--set", *sets]) == 0
    shown = capsys.readouterr().out
    storage = sweep_file.parent / "results"
    records = read_trials(storage / "tiny" / "trials.parquet")
    assert [r.status for r in records] == ["dense", *["finished"] * (trials - 1)]
    files = list((storage / FOLDER).iterdir())
    assert len(files) == len(LEARNERS) + 2  # two budgets of one, and magnitude's scores
    assert {path.suffix for path in files} == {".safetensors"}
    assert shown.count(": learned in ") == len(files) - 1
    alone = [r for r in records if r.origin == "alone"]
    assert {r.methods for r in alone} >= set(LEARNERS)
    used = {
        s["options"]["budget"]
        for r in alone
        if r.methods == "x_pruner"
        for s in r.plan["steps"]
        if s["method"] == "x_pruner"
    }
    assert used
    assert used <= {0.6, 0.8}  # the nearest of its budgets

    # A trial holds the weights that were trained with the scores, cut as the plan says.
    record = next(r for r in alone if r.methods == "x_pruner")
    vit = PrunableViT.load(storage / "tiny" / record.checkpoint)
    assert vit.shape() == Plan.from_json(record.plan).shape(
        check(load_sweep(sweep_file))[0].shape()
    )
    assert read_front(storage / "tiny" / "front.json").members

    client = MlflowClient(tracking_uri=local_uri(storage / "tiny"))
    parent = client.search_runs(
        [client.get_experiment_by_name("tiny").experiment_id], "run_name = 'tiny'"
    )[0]
    assert parent.data.metrics["learning_seconds"] > 0.0
    noted = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "learned.json")).read_text()
    )
    assert len(noted["runs"]) == len(files)

    # Another sweep over the same finds it all.
    assert main(["run", str(sweep_file), "--set", *sets[:1], "trials=3", 'name="second"']) == 0
    assert capsys.readouterr().out.count("learned before") == len(files) - 1
