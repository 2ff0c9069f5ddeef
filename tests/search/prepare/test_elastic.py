"""The elastic start: one step, one run, and what is kept of it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pruners import Plan, PrunableViT, Step, load_method
from pruners.families.learned import Learned
from pruners.subnet import Subnet
from pruners.training.evaluation import evaluate
from pruners.training.optimisation import NonFiniteLossError, schedule_factor
from pruners.training.recipe import Recipe
from search.check import check
from search.data.splits import open_split
from search.prepare.elastic import (
    FOLDER,
    ElasticStart,
    Sandwich,
    elastic_digest,
    tune_elastic,
    tune_once,
)
from search.sweep.spec import Sweep, SweepFailedError
from search.sweep.toml import load_sweep

GROUPED, EVIT, MAGNITUDE = (load_method(name) for name in ("grouped", "evit", "magnitude"))


def plan(heads: float, tokens: float, weights: float) -> Plan:
    steps = []
    for pruner, share, kind in (
        (GROUPED, heads, "neuron"),
        (EVIT, tokens, "token"),
        (MAGNITUDE, weights, "fc1"),
    ):
        sites = [f"blocks.{i}.{kind if kind == 'token' else 'mlp.' + kind}" for i in range(3)]
        steps.append(Step(pruner=pruner, thresholds=dict.fromkeys(sites, share)))
    steps[0].thresholds["blocks.1.attn.head"] = heads
    return Plan(steps=tuple(steps))


START = ElasticStart(
    epochs=2,
    smallest=plan(0.8, 0.3, 0.5),
    plans=(plan(0.3, 0.2, 0.0), plan(0.0, 0.4, 0.2), plan(0.6, 0.0, 0.3)),
)


@pytest.fixture
def sweep(sweep_file: Path) -> Sweep:
    return load_sweep(sweep_file, ["seed=3"])


def splits(sweep: Sweep, dense: PrunableViT) -> list:
    return [open_split(sweep, dense, split) for split in ("train", "val")]


def tensors(vit: PrunableViT) -> list[Tensor]:
    return [p.detach().clone() for p in vit.parameters()]


def some_scores(vit: PrunableViT) -> dict:
    batch = (torch.randn(8, 3, 24, 16), torch.randint(5, (8,)))
    return {p: p.score(vit, [batch]) for p in (GROUPED, MAGNITUDE)}


@pytest.fixture
def sandwich(tiny: Callable[..., PrunableViT]) -> Callable[..., Sandwich]:
    def build(**recipe: float) -> Sandwich:
        vit = tiny()
        made = Sandwich(
            vit, Recipe(epochs=2, precision="float32", **recipe), 5, START, some_scores(vit)
        )
        made.begin_epoch(0)
        return made.train()

    return build


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T^2 sum p log(p / q), written out."""
    p, log_q = (targets / temperature).softmax(-1), (logits / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()


def test_a_step_averages_the_gradients_of_four_models(sandwich) -> None:
    recipe = {"clip": 1e9, "distill": 0.3, "temperature": 2.0, "label_smoothing": 0.1}
    learner = sandwich(**recipe, lr=1e-2, warmup=0.0)
    for position, drawn in enumerate([(0, 1), (2, 0), (1, 2), (0, 1)]):
        images, labels = torch.randn(6, 3, 24, 16), torch.randint(5, (6,))
        before = copy.deepcopy(learner.vit)
        before.zero_grad()
        assert before.training
        logits = before(images)
        with torch.no_grad():
            targets = learner.teacher(images)
        loss = 0.7 * F.cross_entropy(logits, labels, label_smoothing=0.1)
        losses = [loss + 0.3 * divergence(logits, targets, 2.0)]
        subnets = [
            Subnet(before, p, learner.scores)
            for p in (START.smallest, *(START.plans[i] for i in drawn))
        ]
        losses += [divergence(s.vit(images), logits.detach(), 2.0) for s in subnets]
        sum(losses).backward()
        for subnet in subnets:
            subnet.collect()
        told = learner.step(images, labels, 0.0)
        torch.testing.assert_close(told, sum(losses).detach() / 4)
        for own, wanted in zip(learner.vit.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(own.grad, wanted.grad / 4, rtol=1e-3, atol=1e-6)
        assert learner.done == position + 1


def test_the_first_step_is_adamw_with_decay_of_matrices_only(sandwich) -> None:
    learner = sandwich(lr=1e-2, weight_decay=0.3, warmup=0.5, clip=0.05)
    before = tensors(learner.vit)
    learner.step(torch.randn(6, 3, 24, 16), torch.randint(5, (6,)), 0.0)
    gradients = [p.grad for p in learner.vit.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.05))
    lr = 1e-2 / 5  # the first of five steps of warm-up
    for old, new, gradient in zip(before, learner.vit.parameters(), gradients, strict=True):
        decay = 0.3 * old if old.ndim > 1 else 0.0
        wanted = old - lr * (decay + gradient / (gradient.abs() + 1e-8))
        torch.testing.assert_close(new.detach(), wanted, rtol=0, atol=2e-5)


def test_the_learning_rate_runs_over_all_epochs(sandwich) -> None:
    learner = sandwich(lr=0.1, warmup=0.2)
    seen = []
    for epoch in range(2):
        learner.begin_epoch(epoch)
        for _ in range(5):
            learner.step(torch.randn(2, 3, 24, 16), torch.randint(5, (2,)), 0.0)
            seen.append({group["lr"] for group in learner.adam.param_groups})
    assert seen == [{0.1 * schedule_factor(k, 10, 0.2)} for k in range(10)]
    assert seen[1] == {0.1}


def test_without_distillation_there_is_no_teacher(sandwich) -> None:
    learner = sandwich(distill=0.0, clip=1e9)
    assert learner.teacher is None
    images, labels = torch.randn(6, 3, 24, 16), torch.randint(5, (6,))
    logits = learner.vit(images).detach()
    subnets = [Subnet(learner.vit, p, learner.scores) for p in (START.smallest, *START.plans[:2])]
    losses = [divergence(s.vit(images).detach(), logits, 1.0) for s in subnets]
    wanted = (F.cross_entropy(logits, labels) + sum(losses)) / 4
    torch.testing.assert_close(learner.step(images, labels, 0.0), wanted)


def test_only_the_dense_weights_are_kept_of_a_run(sandwich) -> None:
    learner = sandwich()
    names = {f"vit.{n}" for n in learner.vit.state_dict()}
    assert {n for n in learner.state_dict() if not n.startswith("teacher.")} == names
    before = tensors(learner.teacher)
    learner.step(torch.randn(6, 3, 24, 16), torch.randint(5, (6,)), 0.0)
    assert all(map(torch.equal, before, learner.teacher.parameters()))
    # What drops out at random drops out in all models that are trained, never in the teacher.
    assert learner.smallest.vit.training
    assert not learner.teacher.training


@pytest.mark.slow
def test_cuts_cost_less_after_an_elastic_start(sweep: Sweep, tmp_path: Path) -> None:
    dense, _ = check(sweep)
    start = dataclasses.replace(START, epochs=6)
    run = tune_once(sweep, dense, start, tmp_path)
    tuned = PrunableViT.load(run.path)
    assert tuned.shape() == dense.shape()
    train, val = splits(sweep, dense)

    def loss(of: PrunableViT, cut: Plan) -> float:
        vit = copy.deepcopy(of)
        cut.apply(vit, list(train.batches(16, seed=0, augment=False)))
        return evaluate(vit, val.batches(40, seed=None, augment=False)).loss

    for cut in (START.smallest, *START.plans, plan(0.5, 0.3, 0.4)):
        assert loss(tuned, cut) < loss(dense, cut)
    for key, of in (("dense_before", dense), ("dense_after", tuned)):
        found = evaluate(of, val.batches(40, seed=None, augment=False))
        assert run.report[key] == found.top1
    assert run.report["epochs"] == 24.0
    assert run.report["seconds"] > 0.0


@pytest.mark.slow
def test_a_run_is_found_again_and_anything_decisive_changes_its_name(
    sweep: Sweep, sweep_file: Path, tmp_path: Path
) -> None:
    dense, _ = check(sweep)
    before = tensors(dense)
    first = tune_once(sweep, dense, START, tmp_path / "a")
    assert all(map(torch.equal, before, dense.parameters()))
    torch.manual_seed(99)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    twin = tune_once(sweep, dense, START, tmp_path / "b")
    assert torch.equal(torch.rand(1), drawn)  # the caller's numbers go on
    again = tune_once(sweep, dense, START, tmp_path / "a")
    assert (first.reused, twin.reused, again.reused) == (False, False, True)
    assert (again.path, again.report) == (first.path, first.report)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [Path(first.path).name]
    models = [PrunableViT.load(run.path) for run in (first, twin)]
    assert all(map(torch.equal, *map(tensors, models)))
    assert not any(map(torch.equal, tensors(models[0]), before))
    assert "tuned in" in first.describe()
    assert "as much as 8 epochs of one model" in first.describe()
    assert "tuned before" in again.describe()

    train, val = splits(sweep, dense)
    names = {elastic_digest(sweep, dense, START, train, val)}
    known = Learned(scores=GROUPED.score(dense, list(train.batches(16, seed=0, augment=False))))
    weaker = Learned(scores={site: 0.5 * s for site, s in known.scores.items()})
    for change in (
        {"epochs": 3},
        {"smallest": START.plans[0]},
        {"plans": START.plans[::-1]},
        {"learned": {GROUPED: known}},
        {"learned": {GROUPED: weaker}},
        {"learned": {MAGNITUDE: known}},
    ):
        names.add(elastic_digest(sweep, dense, dataclasses.replace(START, **change), train, val))
    names |= {elastic_digest(sweep, dense, START, a, b) for a, b in ((val, val), (train, train))}
    for changed in (
        "seed=4",
        "data.batch_size=8",
        "data.calibration=16",
        "finetune.augment=false",
        "elastic_lr=1e-3",
        "finetune.distill=0.2",
    ):
        other = load_sweep(sweep_file, ["seed=3", changed])
        names.add(elastic_digest(other, dense, START, train, val))
    with torch.no_grad():
        dense.vit.head.bias[0] += 1e-6
    names.add(elastic_digest(sweep, dense, START, train, val))
    assert len(names) == 16
    # What does not decide it does not change it: another sweep finds it again.
    assert (
        elastic_digest(
            load_sweep(sweep_file, ["seed=3", "trials=9", 'name="second"']),
            dense,
            START,
            train,
            val,
        )
        in names
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_by_bit(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, _ = check(sweep)
    start = dataclasses.replace(START, epochs=3)
    whole = PrunableViT.load(tune_once(sweep, dense, start, tmp_path / "a").path)
    begin, begun = Sandwich.begin_epoch, []

    def stopping(self: Sandwich, epoch: int) -> None:
        begun.append(epoch)
        if begun == [0, 1, 2]:
            raise KeyboardInterrupt
        begin(self, epoch)

    monkeypatch.setattr(Sandwich, "begin_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune_once(sweep, dense, start, tmp_path / "b")
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".part"]
    run = tune_once(sweep, dense, start, tmp_path / "b")
    assert begun == [0, 1, 2, 2]
    assert not run.reused
    assert all(map(torch.equal, tensors(PrunableViT.load(run.path)), tensors(whole)))
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [""]


@pytest.mark.slow
def test_a_run_that_died_while_it_wrote_is_not_taken_for_whole(
    sweep: Sweep, tmp_path: Path
) -> None:
    dense, _ = check(sweep)
    start = dataclasses.replace(START, epochs=1)
    run = tune_once(sweep, dense, start, tmp_path)
    (Path(run.path) / "shape.json").unlink()
    assert not tune_once(sweep, dense, start, tmp_path).reused
    assert tune_once(sweep, dense, start, tmp_path).reused


def test_a_report_that_lacks_something_is_named(sweep: Sweep, tmp_path: Path) -> None:
    (dense, _), start = check(sweep), dataclasses.replace(START, epochs=1)
    path = Path(tune_once(sweep, dense, start, tmp_path).path) / "shape.json"
    description = json.loads(path.read_text())
    del description["measured"]["dense_after"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"shape\.json reports .*; remove .*, to tune again"):
        tune_once(sweep, dense, start, tmp_path)


def test_a_seed_decides_the_run(sweep: Sweep, sweep_file: Path, tmp_path: Path) -> None:
    dense, _ = check(sweep)
    start = dataclasses.replace(START, epochs=1)
    found = [
        tensors(PrunableViT.load(tune_once(s, dense, start, tmp_path).path))
        for s in (sweep, load_sweep(sweep_file, ["seed=4"]))
    ]
    assert not any(map(torch.equal, *found))


def test_known_scores_are_used(sweep: Sweep, tmp_path: Path, monkeypatch) -> None:
    dense, _ = check(sweep)
    batches = list(open_split(sweep, dense, "train").batches(16, seed=0, augment=False))
    backwards = {site: -s for site, s in GROUPED.score(dense, batches).items()}
    seen = []
    init = Sandwich.__init__

    def noting(self: Sandwich, vit, recipe, steps, start, scores) -> None:
        seen.append(scores)
        init(self, vit, recipe, steps, start, scores)

    monkeypatch.setattr(Sandwich, "__init__", noting)
    known = {GROUPED: Learned(scores=backwards), EVIT: Learned(scores={})}
    tune_once(sweep, dense, dataclasses.replace(START, epochs=1, learned=known), tmp_path)
    assert set(seen[0]) == {GROUPED, EVIT, MAGNITUDE}
    assert seen[0][GROUPED] is backwards


def test_a_loss_that_is_not_finite_ends_the_run(sweep_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file, ["elastic_lr=1e30"])
    dense, _ = check(sweep)
    with pytest.raises(NonFiniteLossError, match="loss is nan in learning epoch 1"):
        tune_once(sweep, dense, START, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


def test_a_start_without_epochs_or_plans_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs of an elastic start are 0; give at least 1"):
        dataclasses.replace(START, epochs=0)
    with pytest.raises(ValueError, match="has no plans; give at least one"):
        dataclasses.replace(START, plans=())


@pytest.mark.usefixtures("ray_session")
def test_a_ray_task_tunes_and_says_that_it_still_runs(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.prepare.elastic.HEARTBEAT_S", 0.05)
    dense, _ = check(sweep)
    heard: list[int] = []
    run = tune_elastic(sweep, dense, START, lambda: heard.append(1))
    assert heard
    assert Path(run.path).parent == Path(sweep.storage).resolve() / FOLDER
    found = tensors(PrunableViT.load(run.path))
    assert not any(map(torch.equal, found, dense.parameters()))
    assert tune_elastic(sweep, dense, START, lambda: None).reused


@pytest.mark.usefixtures("ray_session")
def test_a_method_that_cannot_share_ends_the_sweep_by_name(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["max_failures=0"])
    dense, _ = check(sweep)
    mover = load_method("woodfisher")
    cut = Plan(steps=(Step(pruner=mover, thresholds={"blocks.0.mlp.fc1": 0.5}),))
    start = dataclasses.replace(START, plans=(cut,))
    with pytest.raises(
        SweepFailedError, match=r"elastic start failed: .*woodfisher changes the weights that it"
    ):
        tune_elastic(sweep, dense, start, lambda: None)
