from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pruners import PrunableViT, ViTShape
from pruners.training import evaluate
from search.check import check
from search.searcher import PlanSearcher
from search.sweep import load_sweep
from search.trial import (
    STATE,
    PlanTrial,
    TrialInputs,
    measure_on_test,
    open_split,
    trial_device,
)


@pytest.fixture
def inputs(sweep_file: Path) -> TrialInputs:
    sweep = load_sweep(sweep_file, ["epochs=2", "seed=5"])
    return TrialInputs(sweep=sweep, dense=check(sweep)[0])


@pytest.fixture
def configs(inputs: TrialInputs) -> list[dict]:
    searcher = PlanSearcher(inputs.sweep, check(inputs.sweep)[1])
    return [searcher.suggest(f"t{i}") for i in range(4)]


def trial(config: dict, inputs: TrialInputs) -> PlanTrial:
    class Here(PlanTrial):
        def setup(self, config: dict) -> None:  # type: ignore[override]
            super().setup(config, inputs)

    return Here(config)


def run(one: PlanTrial) -> list[dict]:
    results = [one.step()]
    while not results[-1]["done"]:
        results.append(one.step())
    return results


def weights(one: PlanTrial) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.vit.parameters()]


def test_a_trial_reports_epoch_zero_then_each_epoch(inputs, configs) -> None:
    results = run(trial(configs[1], inputs))
    assert [r["epoch"] for r in results] == [0, 1, 2]
    assert [r["status"] for r in results] == ["running", "running", "finished"]
    assert results[0]["train_loss"] == 0.0 < results[1]["train_loss"]
    last = results[-1]
    assert 0.5 <= last["cost_ratio"] <= 0.9
    ratio = last["effective_gmacs"] / check(inputs.sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(last["cost_ratio"])
    shape = ViTShape.from_json(json.loads(last["shape"]))
    assert shape.nonzero  # magnitude acted
    assert shape.blocks[0].hidden < 96  # grouped acted
    assert shape.blocks[-1].mlp_tokens < shape.blocks[0].tokens  # evit acted


def test_the_dense_trial_only_measures(inputs, configs) -> None:
    (result,) = run(trial(configs[0], inputs))
    images = open_split(inputs.sweep, inputs.dense, "val")
    expected = evaluate(inputs.dense, images.batches(256, seed=None, augment=False))
    assert result["val_top1"] == expected.top1
    assert (result["cost_ratio"], result["density"], result["status"]) == (1.0, 1.0, "finished")


def test_zeros_stay_zero_through_fine_tuning(inputs, configs) -> None:
    one = trial(configs[1], inputs)
    run(one)
    layers = dict(one.vit.linears())
    assert set(one.vit.masks) == set(layers)
    for site, mask in one.vit.masks.items():
        assert (layers[site].weight[~mask] == 0).all()


def test_a_resumed_trial_is_the_same_trial(inputs, configs, tmp_path) -> None:
    straight = trial(configs[2], inputs)
    expected = run(straight)
    killed = trial(configs[2], inputs)
    for _ in range(2):
        killed.step()
    killed.save_checkpoint(str(tmp_path))
    resumed = trial(configs[2], inputs)
    resumed.load_checkpoint(str(tmp_path))
    (last,) = run(resumed)
    for ours, theirs in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(ours, theirs)
    for key in ("epoch", "val_top1", "train_loss", "shape", "status"):
        assert last[key] == expected[-1][key]


def test_a_finished_trials_checkpoint_is_a_model_and_nothing_else(
    inputs, configs, tmp_path
) -> None:
    one = trial(configs[1], inputs)
    last = run(one)[-1]
    one.save_checkpoint(str(tmp_path))
    assert not (tmp_path / STATE).exists()
    vit = PrunableViT.load(tmp_path)
    images = open_split(inputs.sweep, inputs.dense, "val")
    assert evaluate(vit, images.batches(256, seed=None, augment=False)).top1 == last["val_top1"]
    top1 = measure_on_test(tmp_path, inputs.sweep, inputs.dense)
    assert 0.0 <= top1 <= 100.0


def test_a_reused_actor_gives_what_a_fresh_one_gives(inputs, configs) -> None:
    fresh = trial(configs[2], inputs)
    expected = run(fresh)
    reused = trial(configs[1], inputs)
    run(reused)
    assert reused.reset_config(configs[2])
    results = run(reused)
    assert [r["val_top1"] for r in results] == [r["val_top1"] for r in expected]
    for ours, theirs in zip(weights(reused), weights(fresh), strict=True):
        assert torch.equal(ours, theirs)


def test_the_dense_model_is_never_changed(inputs, configs) -> None:
    before = [p.detach().clone() for p in inputs.dense.parameters()]
    run(trial(configs[1], inputs))
    for ours, theirs in zip(inputs.dense.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_fails_by_name(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["finetune.lr=1e30", "finetune.warmup=0.0", "epochs=3"])
    inputs = TrialInputs(sweep=sweep, dense=check(sweep)[0])
    searcher = PlanSearcher(sweep, check(sweep)[1])
    searcher.suggest("t0")
    last = run(trial(searcher.suggest("t1"), inputs))[-1]
    assert (last["status"], last["done"]) == ("failed", True)
    assert "loss is nan" in last["reason"]
    assert last["reason"].startswith("epoch ")


def test_gpus_that_pytorch_cannot_use_are_named(sweep_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sweep = load_sweep(sweep_file, ["resources.gpu=0.5"])
    with pytest.raises(ValueError, match=r"resources\.gpu is 0\.5, but PyTorch finds no GPU"):
        trial_device(sweep)
    assert trial_device(load_sweep(sweep_file)) == torch.device("cpu")


def test_a_ramped_step_ends_at_its_budget(sweep_file: Path) -> None:
    steps = 'steps=[{method="taylor", ramp_epochs=2}]'
    sweep = load_sweep(sweep_file, [steps, "epochs=3"])
    inputs = TrialInputs(sweep=sweep, dense=check(sweep)[0])
    searcher = PlanSearcher(sweep, check(sweep)[1])
    searcher.suggest("t0")
    config = searcher.suggest("t1")
    results = run(trial(config, inputs))
    densities = [r["density"] for r in results]
    assert densities[0] > densities[1] > densities[2] == densities[3]
    ratio = results[-1]["effective_gmacs"] / check(sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(config["cost_ratio"])


@pytest.mark.parametrize("method", ["obd", "fisher", "woodfisher", "mfac", "cap", "fast_cap"])
def test_every_weight_method_runs_as_a_step(method: str, sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, [f'steps=[{{method="evit"}}, {{method="{method}"}}]'])
    inputs = TrialInputs(sweep=sweep, dense=check(sweep)[0])
    searcher = PlanSearcher(sweep, check(sweep)[1])
    searcher.suggest("t0")
    last = run(trial(searcher.suggest("t1"), inputs))[-1]
    assert last["status"] == "finished"
    assert last["density"] < 1.0


@pytest.mark.parametrize("method", ["tome", "dynamic_vit", "spvit", "cait_tokens"])
def test_every_token_method_runs_as_a_step_and_resumes(
    method: str, sweep_file: Path, tmp_path: Path
) -> None:
    steps = f'steps=[{{method="grouped"}}, {{method="{method}"}}, {{method="magnitude"}}]'
    sweep = load_sweep(sweep_file, [steps, "epochs=3"])
    inputs = TrialInputs(sweep=sweep, dense=check(sweep)[0])
    searcher = PlanSearcher(sweep, check(sweep)[1])
    searcher.suggest("t0")
    config = searcher.suggest("t1")
    straight = trial(config, inputs)
    expected = run(straight)
    assert expected[-1]["status"] == "finished"
    assert json.loads(expected[-1]["shape"])["blocks"][2]["mlp_tokens"] < 25
    ratio = expected[-1]["effective_gmacs"] / check(sweep)[1].dense_cost * 1e9
    assert ratio == pytest.approx(config["cost_ratio"])
    killed = trial(config, inputs)
    for _ in range(2):
        killed.step()
    killed.save_checkpoint(str(tmp_path / "checkpoint"))
    resumed = trial(config, inputs)
    resumed.load_checkpoint(str(tmp_path / "checkpoint"))
    assert run(resumed)[-1]["train_loss"] == expected[-1]["train_loss"]
    for ours, theirs in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(ours, theirs)
