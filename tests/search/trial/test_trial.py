from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import search.data.splits
from pruners import PrunableViT, ViTShape
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.optimisation import NonFiniteLossError
from search.check import check
from search.data.images import Images
from search.data.splits import open_split, trial_device
from search.data.teacher import PREFIX, Teacher
from search.records.events import EpochResult, TrialConfig
from search.records.ledger import Ledger
from search.records.trial_record import model_path
from search.strategy.searcher import PlanSearcher
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from search.trial.inputs import TrialInputs
from search.trial.measure_on_test import measure_on_test
from search.trial.preemption import ToldToEndError
from search.trial.trial import Trial
from search.trial.workers import OneWorker
from tests.search.trial_events import config_of

COUNTER = itertools.count()


def whole_inputs(sweep) -> TrialInputs:
    dense, _ = check(sweep)
    return TrialInputs(sweep=sweep, dense=dense, start=dense, directory=sweep.directory)


@pytest.fixture
def inputs(sweep_file: Path) -> TrialInputs:
    sweep = load_sweep(sweep_file, ["epochs=2", "seed=5"])
    return whole_inputs(sweep)


def searcher_of(sweep: Sweep) -> PlanSearcher:
    sweep.directory.mkdir(parents=True, exist_ok=True)
    return PlanSearcher(sweep, check(sweep)[1], Ledger(sweep))


def first_plan(sweep: Sweep) -> TrialConfig:
    """The first that is cut."""
    searcher = searcher_of(sweep)
    searcher.suggest("t0")
    return TrialConfig.from_json(searcher.suggest("t1"))


@pytest.fixture
def configs(inputs: TrialInputs) -> list[TrialConfig]:
    searcher = searcher_of(inputs.sweep)
    return [TrialConfig.from_json(searcher.suggest(f"t{i}")) for i in range(4)]


def trial(config: TrialConfig, inputs: TrialInputs, directory: Path | None = None) -> Trial:
    """A trial of a sweep of its own, or one that finds what others left in a directory."""
    apart = directory or inputs.directory / f"apart-{next(COUNTER)}"
    return Trial.first(dataclasses.replace(inputs, directory=apart), config, OneWorker())


def run(one: Trial) -> list[EpochResult]:
    results = [one.step()]
    while not results[-1].done:
        results.append(one.step())
    return results


def weights(one: Trial) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.vit.parameters()]


def test_a_trial_reports_epoch_zero_then_each_epoch(inputs, configs) -> None:
    results = run(trial(configs[1], inputs))
    assert [r.epoch for r in results] == [0, 1, 2]
    assert [r.status for r in results] == ["running", "running", "finished"]
    assert results[0].train_loss == 0.0 < results[1].train_loss
    last = results[-1]
    assert 0.5 <= last.cost_ratio <= 0.9
    ratio = last.effective_gmacs / check(inputs.sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(last.cost_ratio)
    shape = ViTShape.from_json(json.loads(last.shape))
    assert shape.nonzero  # magnitude acted
    assert shape.blocks[0].hidden < 96  # grouped acted
    assert shape.blocks[-1].mlp_tokens < shape.blocks[0].tokens  # evit acted


def test_the_dense_trial_only_measures(inputs, configs) -> None:
    (result,) = run(trial(configs[0], inputs))
    images = open_split(inputs.sweep, inputs.dense, "val")
    expected = evaluate(inputs.dense, images.batches(256, seed=None, augment=False))
    assert result.val_top1 == expected.top1
    assert result.by_class == list(expected.by_class)
    assert (result.cost_ratio, result.density, result.status) == (1.0, 1.0, "finished")


def test_zeros_stay_zero_through_fine_tuning(inputs, configs) -> None:
    one = trial(configs[1], inputs)
    run(one)
    layers = dict(one.vit.linears())
    assert set(one.vit.masks) == set(layers)
    for site, mask in one.vit.masks.items():
        assert (layers[site].weight[~mask] == 0).all()


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_trial_is_the_same_trial(done: int, inputs, configs, tmp_path: Path) -> None:
    straight = trial(configs[2], inputs)
    expected = run(straight)
    killed = trial(configs[2], inputs, tmp_path)
    before = [killed.step() for _ in range(done)]
    resumed = trial(configs[2], inputs, tmp_path)
    results = run(resumed)
    assert results[:done] == before  # the driver may not have heard of them
    for ours, theirs in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(ours, theirs)
    for key in ("epoch", "val_top1", "train_loss", "shape", "status"):
        assert [getattr(r, key) for r in results] == [getattr(r, key) for r in expected]
    assert len({r.latency_ms for r in results}) == 1  # measured once


def comparable(results: list[EpochResult]) -> list[tuple]:
    keys = ("epoch", "val_top1", "val_loss", "train_loss", "shape", "status")
    return [tuple(getattr(r, key) for key in keys) for r in results]


@pytest.mark.parametrize("steps", [1, 4, 5])  # of the five of its second epoch
def test_a_trial_that_is_told_to_end_goes_on_in_the_middle_of_an_epoch(
    steps: int, inputs, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trial(configs[2], inputs)
    expected = run(straight)
    preempted = trial(configs[2], inputs, tmp_path)
    before = [preempted.step(), preempted.step()]
    context, tuner = preempted.context, preempted.training.tuner
    monkeypatch.setattr(context.notice, "given", lambda: tuner.steps >= steps)
    with pytest.raises(ToldToEndError, match="told to end"):
        preempted.step()
    (left,) = (tmp_path / "models" / configs[2].trial).iterdir()
    assert left.name == f"epoch-0001-{steps:06d}"
    moved = trial(configs[2], inputs, tmp_path)
    assert moved.seconds > before[-1].seconds
    results = run(moved)
    assert results[:2] == before
    assert comparable(results) == comparable(expected)
    for ours, theirs in zip(weights(moved), weights(straight), strict=True):
        assert torch.equal(ours, theirs)


def test_a_process_that_is_told_to_end_between_epochs_leaves_them_to_the_next(
    inputs, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial(configs[2], inputs, tmp_path)
    before = one.step()
    monkeypatch.setattr(FineTuner, "train_taught", lambda tuner, batches, leave: 1.0)
    monkeypatch.setattr(one.context.notice, "given", lambda: True)
    with pytest.raises(ToldToEndError):
        one.step()
    again = trial(configs[2], inputs, tmp_path)
    assert again.step() == before
    assert again.step().train_loss == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("fits", [2, 16, 17])
def test_a_trial_that_runs_out_of_memory_takes_smaller_parts(
    fits: int, inputs, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 16 in as many parts as it takes, or not at all."""
    expected = run(trial(configs[2], inputs))
    backward, tried = FineTuner._backward, []

    def limited(tuner: FineTuner, images: torch.Tensor, *others: object) -> torch.Tensor:
        if tuner.parts < fits and tuner.schedule.last_epoch >= 7:  # in the second epoch
            tried.append(len(images) // tuner.parts)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(tuner, images, *others)

    monkeypatch.setattr(FineTuner, "_backward", limited)
    one = trial(configs[2], inputs, tmp_path)
    results = run(one)
    if fits > 16:
        assert results[-1].status == "failed"
        assert results[-1].reason == "epoch 2: out of memory"
        assert tried == [16, 8, 4, 2, 1]
        return
    assert one.config.parts == fits
    assert comparable(results[:2]) == comparable(expected[:2])  # as before, and reported once
    assert [r.epoch for r in results] == [0, 1, 2]
    assert results[-1].train_loss == pytest.approx(expected[-1].train_loss, rel=1e-3)
    assert results[-1].val_loss == pytest.approx(expected[-1].val_loss, rel=1e-3)


def test_what_is_damaged_is_named_and_the_trial_begins_anew(
    inputs, configs, tmp_path: Path
) -> None:
    expected = run(trial(configs[2], inputs))
    torn = trial(configs[2], inputs, tmp_path)
    torn.step()
    torn.step()
    path = tmp_path / model_path(configs[2].trial, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    results = run(trial(configs[2], inputs, tmp_path))
    assert comparable(results) == comparable(expected)
    assert {r.reason for r in results} == {f"began anew: {path} is damaged or missing"}
    resumed = run(trial(configs[2], inputs, tmp_path))
    assert resumed == results


def test_a_trial_that_has_ended_is_not_run_again(
    inputs, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(trial(configs[2], inputs, tmp_path))
    monkeypatch.setattr(Trial, "_cut", lambda _: pytest.fail("it was cut again"))
    actor = trial(configs[1], inputs)
    actor.context = dataclasses.replace(actor.context, directory=tmp_path)
    assert run(actor.next(configs[2])) == results


def test_of_another_trial_of_its_name_nothing_is_taken(inputs, configs, tmp_path: Path) -> None:
    run(trial(configs[2], inputs, tmp_path))
    expected = run(trial(dataclasses.replace(configs[2], seed=1), inputs))
    results = run(trial(dataclasses.replace(configs[2], seed=1), inputs, tmp_path))
    assert [r.val_loss for r in results] == [r.val_loss for r in expected]
    (left,) = (tmp_path / "models" / configs[2].trial).iterdir()
    assert left.name == "epoch-0002"


def test_a_failed_trial_leaves_its_last_good_epoch(
    inputs, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial(configs[1], inputs, tmp_path)
    results = [one.step(), one.step()]

    def fails(*_: object) -> float:
        raise NonFiniteLossError("loss is nan")

    monkeypatch.setattr(FineTuner, "train_taught", fails)
    assert one.step().status == "failed"
    (left,) = (tmp_path / "models" / configs[1].trial).iterdir()
    assert left.name == "epoch-0001"
    again = trial(configs[1], inputs, tmp_path)
    assert [again.step(), again.step()] == results
    assert again.step().status == "failed"


def test_what_a_finished_trial_leaves_is_its_model(inputs, configs, tmp_path: Path) -> None:
    one = trial(configs[1], inputs, tmp_path)
    last = run(one)[-1]
    left = tmp_path / model_path(configs[1].trial, 2)
    assert sorted(os.listdir(left)) == ["model.safetensors", "results.json", "shape.json"]
    vit = PrunableViT.load(left)
    images = open_split(inputs.sweep, inputs.dense, "val")
    assert evaluate(vit, images.batches(256, seed=None, augment=False)).top1 == last.val_top1
    top1 = measure_on_test(left, inputs.sweep, inputs.dense)
    assert 0.0 <= top1 <= 100.0


def test_a_reused_actor_gives_what_a_fresh_one_gives(inputs, configs) -> None:
    fresh = trial(configs[2], inputs)
    expected = run(fresh)
    reused = trial(configs[1], inputs)
    run(reused)
    reused = reused.next(configs[2])
    results = run(reused)
    assert [r.val_top1 for r in results] == [r.val_top1 for r in expected]
    for ours, theirs in zip(weights(reused), weights(fresh), strict=True):
        assert torch.equal(ours, theirs)


def test_the_dense_model_is_never_changed(inputs, configs) -> None:
    before = [p.detach().clone() for p in inputs.dense.parameters()]
    run(trial(configs[1], inputs))
    for ours, theirs in zip(inputs.dense.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_fails_by_name(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["finetune.lr=1e30", "finetune.warmup=0.0", "epochs=3"])
    inputs = whole_inputs(sweep)
    last = run(trial(first_plan(sweep), inputs))[-1]
    assert (last.status, last.done) == ("failed", True)
    assert "loss is nan" in last.reason
    assert last.reason.startswith("epoch ")


def test_gpus_that_pytorch_cannot_use_are_named(sweep_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sweep = load_sweep(sweep_file, ["resources.gpu=0.5"])
    with pytest.raises(ValueError, match=r"resources\.gpu is 0\.5, but PyTorch finds no GPU"):
        trial_device(sweep)
    assert trial_device(load_sweep(sweep_file)) == torch.device("cpu")


def test_a_ramped_step_ends_at_its_budget(sweep_file: Path) -> None:
    steps = 'steps=[{method="taylor", ramp_epochs=2}]'
    sweep = load_sweep(sweep_file, [steps, "epochs=3"])
    inputs = whole_inputs(sweep)
    config = first_plan(sweep)
    results = run(trial(config, inputs))
    densities = [r.density for r in results]
    assert densities[0] > densities[1] > densities[2] == densities[3]
    ratio = results[-1].effective_gmacs / check(sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(config.cost_ratio)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["obd", "fisher", "woodfisher", "mfac", "cap", "fast_cap"])
def test_every_weight_method_runs_as_a_step(method: str, sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, [f'steps=[{{method="evit"}}, {{method="{method}"}}]'])
    inputs = whole_inputs(sweep)
    last = run(trial(first_plan(sweep), inputs))[-1]
    assert last.status == "finished"
    assert last.density < 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["tome", "pitome", "mctf", "dynamic_vit", "spvit", "cait_tokens"]
)
def test_every_token_method_runs_as_a_step_and_resumes(
    method: str, sweep_file: Path, tmp_path: Path
) -> None:
    steps = f'steps=[{{method="grouped"}}, {{method="{method}"}}, {{method="magnitude"}}]'
    sweep = load_sweep(sweep_file, [steps, "epochs=3"])
    inputs = whole_inputs(sweep)
    config = first_plan(sweep)
    straight = trial(config, inputs)
    expected = run(straight)
    assert expected[-1].status == "finished"
    assert json.loads(expected[-1].shape)["blocks"][2]["mlp_tokens"] < 25
    ratio = expected[-1].effective_gmacs / check(sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(config.cost_ratio)
    killed = trial(config, inputs, tmp_path / "killed")
    for _ in range(2):
        killed.step()
    resumed = trial(config, inputs, tmp_path / "killed")
    assert run(resumed)[-1].train_loss == expected[-1].train_loss
    for ours, theirs in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(ours, theirs)


def inputs_with(sweep_file: Path, *sets: str) -> TrialInputs:
    sweep = load_sweep(sweep_file, ["epochs=2", "finetune.precision='float32'", *sets])
    return whole_inputs(sweep)


def answers_in(folder: Path) -> list[Path]:
    return list((folder / "cache").glob(f"{PREFIX}*.npy"))


def test_answers_from_disk_train_as_the_live_teacher_does(
    sweep_file: Path, configs, tmp_path: Path
) -> None:
    live_inputs = inputs_with(sweep_file, "data.teacher_gb=0", "finetune.distill=0.9")
    live = trial(configs[2], live_inputs)
    expected = run(live)
    alone = run(trial(configs[2], inputs_with(sweep_file, "finetune.distill=0.0")))
    assert not answers_in(tmp_path)
    known = trial(configs[2], inputs_with(sweep_file, "finetune.distill=0.9"))
    results = run(known)
    assert len(answers_in(tmp_path)) == 2
    assert known.training.tuner.teacher is None
    for ours, theirs, without in zip(results[1:], expected[1:], alone[1:], strict=True):
        # Logits up to 4 are off by at most 2^-10, so the divergence of two outputs is by less.
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-3)
        assert ours.val_loss == pytest.approx(theirs.val_loss, abs=2e-3)
        assert abs(without.train_loss - theirs.train_loss) > 0.05
    for ours, theirs in zip(weights(known), weights(live), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)


def test_an_epochs_answers_serve_all_trials_and_actors(
    sweep_file: Path, configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_with(sweep_file)
    run(trial(configs[1], inputs))
    monkeypatch.setattr(Teacher, "_ask", lambda *_: pytest.fail("the dense model was asked"))
    last = run(trial(configs[2], inputs))[-1]
    assert last.status == "finished"


def streams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, list[int]]]:
    """Batches that are trained on from here on."""
    seen: list[tuple[torch.Tensor, list[int]]] = []
    numbered = Images.numbered

    def noting(self: Images, *args, **options):
        for images, labels, rows in numbered(self, *args, **options):
            if options["order"] is not None and options["views"] is not None:
                seen.append((images, rows.tolist()))
            yield images, labels, rows

    monkeypatch.setattr(Images, "numbered", noting)
    return seen


def test_all_trials_see_the_same_images_in_the_same_epoch(
    inputs, configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = streams(monkeypatch)
    run(trial(configs[1], inputs))
    first = seen[:]
    seen.clear()
    run(trial(configs[2], inputs))
    assert len(first) == len(seen) == 10  # two epochs of five batches
    for (ours, rows), (theirs, others) in zip(seen, first, strict=True):
        assert rows == others
        assert torch.equal(ours, theirs)
    epochs = [[row for _, rows in first[part] for row in rows] for part in (slice(5), slice(5, 10))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(80))
    assert epochs[0] != epochs[1]
    looks = [
        {
            row: image
            for images, rows in first[part]
            for row, image in zip(rows, images, strict=True)
        }
        for part in (slice(5), slice(5, 10))
    ]
    same = [torch.equal(looks[0][row], looks[1][row]) for row in range(80)]
    assert np.mean(same) < 0.2


def test_another_seed_of_the_configuration_is_another_stream_of_the_same_plan(
    inputs, configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = streams(monkeypatch)
    runs = []
    for seed in (0, 0, 1, 1):
        one = trial(dataclasses.replace(configs[2], seed=seed), inputs)
        result = run(one)
        runs.append((result, [rows for _, rows in seen], weights(one)))
        seen.clear()
    for first, second in ((0, 1), (2, 3)):
        assert runs[first][1] == runs[second][1]
        assert all(map(torch.equal, runs[first][2], runs[second][2]))
    assert runs[0][1] != runs[2][1]
    assert runs[0][0][-1].train_loss != runs[2][0][-1].train_loss
    assert runs[0][0][0].val_loss == runs[2][0][0].val_loss  # the cut is the plan's


def test_another_seed_of_the_sweep_is_another_stream(
    sweep_file: Path, configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = streams(monkeypatch)
    orders = []
    for seed in (1, 2):
        run(trial(configs[1], inputs_with(sweep_file, f"seed={seed}")))
        orders.append([rows for _, rows in seen])
        seen.clear()
    assert orders[0] != orders[1]


def test_what_is_drawn_in_a_trial_is_its_own(inputs, configs) -> None:
    drawn = []
    for config in (configs[1], configs[2], configs[1], dataclasses.replace(configs[1], seed=1)):
        one = trial(config, inputs)
        one.step()
        next(one.training.batches(1))
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2]
    assert len(set(drawn)) == 3


def test_a_loss_on_tokens_asks_the_teacher_live(sweep_file: Path, tmp_path: Path) -> None:
    inputs = inputs_with(sweep_file, 'steps=[{method="dynamic_vit"}]')
    one = trial(first_plan(inputs.sweep), inputs)
    run(one)
    assert one.training.tuner.teacher is one.context.teacher.live
    assert not answers_in(tmp_path)


def test_scoring_reads_its_images_once_and_only_when_asked(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    calibration_batches = search.data.splits.calibration_batches

    def noting(*args):
        read.append(args)
        return calibration_batches(*args)

    monkeypatch.setattr("search.data.splits.calibration_batches", noting)
    plans = {
        method: json.dumps(
            {"steps": [{"method": method, "options": {}, "thresholds": {site: 0.5}}]}
        )
        for method, site in (("magnitude", "blocks.0.mlp.fc1"), ("taylor", "blocks.1.mlp.fc1"))
    }
    config = config_of("0001", epochs=1, plan=plans["magnitude"])
    one = trial(config, inputs_with(sweep_file))
    run(one)
    assert not read
    for count in range(2):
        one = one.next(dataclasses.replace(config, plan=plans["taylor"]))
        run(one)
        assert len(read) == 1, count
    context = one.context
    held = list(context.calibration)
    for (ours, labels), (theirs, others) in zip(
        held, calibration_batches(context.sweep, context.train_images, context.device), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(labels, others)
