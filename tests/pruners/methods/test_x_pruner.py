from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pruners import cost_of, load_method
from pruners.model.gates import remove_gates
from pruners.training.learner import LearningData, run
from tests.models import images_for


def fresh(vit, batches, **options):
    method = load_method("x_pruner", **options)
    return method, method.learner(copy.deepcopy(vit), LearningData.of(batches))


def in_stage_2(vit, batches, **options):
    method, learner = fresh(vit, batches, mask_epochs=1, **options)
    run(learner, LearningData.of(batches), 1, seed=0)
    learner.begin_epoch(1)
    return method, learner


def budget_batches(count: int = 40):
    """Images whose class is their brightness, so that there is something to keep."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (count, 16), generator=generator)
    noise = torch.randn(count, 16, 3, 24, 16, generator=generator)
    return [(n + lab.view(-1, 1, 1, 1) - 2.0, lab) for n, lab in zip(noise, labels, strict=True)]


def test_masks_have_a_value_per_unit_and_class_and_ones_change_nothing(tiny, batches) -> None:
    vit = tiny()
    _, learner = fresh(vit, batches)
    assert [tuple(mask.shape) for mask in learner.masks.values] == [(5, 24), (5, 96)] * 3
    images = images_for(vit, 5)
    for gate, mask in zip(learner._gates, learner.masks.values, strict=True):
        gate.value = mask[torch.arange(5)].unsqueeze(1)
    assert torch.equal(learner.vit(images), vit(images))


def test_a_step_moves_only_the_rows_of_its_labels_and_no_weight(tiny, batches) -> None:
    vit = tiny()
    _, learner = fresh(vit, batches, smoothness=0.0)
    learner.begin_epoch(0)
    learner.step(batches[0][0], torch.tensor([1, 3, 3, 1, 1, 3]), 0.0)
    for mask in learner.masks.values:
        moved = (mask != 1.0).any(dim=1)
        assert moved.tolist() == [False, True, False, True, False]
    remove_gates(learner.vit)
    for name, tensor in learner.vit.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name]), name


def test_labels_matter_in_stage_1_and_never_afterwards(tiny, batches) -> None:
    """The label leak: a masked forward pass knows the label, what is concluded must not."""
    vit = tiny()
    _, learner = in_stage_2(vit, batches, epochs=1)
    image = images_for(vit, 1)
    learner.vit.eval()

    def logits(label: int):
        for gate, mask in zip(learner._gates, learner.masks.values, strict=True):
            gate.value = mask[[label]].unsqueeze(1)
        return learner.vit(image)

    assert (logits(0) - logits(1)).abs().max() > 1e-4
    learner.step(image, torch.tensor([0]), 0.9)
    assert all(gate.value.shape[:-1] == () for gate in learner._gates)  # one value per unit
    learned = learner.conclude(LearningData.of(batches))
    vit.vit.load_state_dict(dict(learned.weights))
    assert torch.isfinite(vit(image)).all()  # a plain model that takes nothing but images


def test_thresholds_get_gradient_from_the_task_and_the_budget_takes_its_part_out(
    tiny, batches
) -> None:
    _, learner = in_stage_2(tiny(), batches)
    learner.train()
    learner.removal = 0.4
    gates = learner.gate_values()
    for gate, site in zip(learner._gates, learner.sites, strict=True):
        gate.value = gates[site].repeat_interleave(learner.masks_per_unit[site])
    learner._task_loss(*batches[0]).backward()
    task = learner.thresholds.grad.clone()
    assert (task[1::2] != 0).all()  # of the neurons; a site of three heads may lie far from it
    (budget,) = torch.autograd.grad(learner.removed_macs(learner.gate_values()), learner.thresholds)
    assert (budget[1::2] > 0).all()
    assert (budget >= 0).all()
    learner.hold_budget(learner.removed_macs(learner.gate_values()))
    left = learner.thresholds.grad
    assert abs(left @ budget) < 1e-5 * left.norm() * budget.norm()
    change = task - left  # one gamma for all sites
    torch.testing.assert_close(change, budget * (change @ budget) / (budget @ budget))


def test_a_raised_threshold_takes_from_its_site_and_gives_to_the_others(tiny, batches) -> None:
    _, learner = in_stage_2(tiny(), batches)
    learner.removal = 0.5
    site = "blocks.1.mlp.neuron"
    kept = {s: gate.bool() for s, gate in learner.gate_values().items()}
    cost = max(learner.costs[s] / len(gate) for s, gate in kept.items())  # of the largest unit
    for step in range(1, 5):
        with torch.no_grad():
            learner.thresholds[learner.sites.index(site)] = 0.1 * step
        gates = learner.gate_values()
        assert 0.5 - cost <= learner.removed_macs(gates) <= 0.5 + cost
        now = {s: gate.bool() for s, gate in gates.items()}
        assert all((now[s] <= kept[s] if s == site else now[s] >= kept[s]).all() for s in kept)
        assert now[site].any()
        assert now[site].sum() < kept[site].sum() or kept[site].sum() == 1
        kept = now


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "neurons"), [(6, 4.0), (60, 40.0)])
def test_masks_and_thresholds_act_on_runs_and_sizes_tenfold(steps, neurons, tiny) -> None:
    """A tenth of the steps or ten times the neurons: the masks still reach the budget and tell
    units apart, thresholds keep it and move by some hundredths of all multiply-adds."""
    vit = tiny(depth=2, mlp_ratio=neurons)
    data = LearningData.of(budget_batches(steps // 2))
    method, learner = fresh(vit, budget_batches(steps // 2), mask_epochs=2, epochs=2)
    run(learner, data, method.total_epochs(), seed=0)
    masks = learner.masks_by_class()
    total = sum(learner.costs.values())
    mean = sum(learner.costs[s] / total * mask.mean() for s, mask in masks.items())
    assert mean.item() == pytest.approx(0.5, abs=0.05)
    for site, mask in masks.items():
        if site.endswith("neuron"):
            assert mask.mean(0).std() > 0.1, site
    learner.removal = 0.5
    removed = learner.removed_macs(learner.gate_values()).item()
    assert removed == pytest.approx(0.5, abs=0.05)
    moved = learner.thresholds.detach()
    assert 0.02 < (moved.max() - moved.min()) < 0.8


def test_hard_gates_equal_surgery_and_the_formula_the_flop_counter(tiny, batches) -> None:
    vit = tiny()
    method, learner = in_stage_2(vit, batches)
    with torch.no_grad():
        learner.thresholds.copy_(torch.tensor([0.0, 0.1, -0.2, 0.2, -0.1, 0.3]))
    learner.removal = 1.0 - method.budget
    gates = learner.gate_values()
    for gate, site in zip(learner._gates, learner.sites, strict=True):
        gate.value = gates[site].detach().repeat_interleave(learner.masks_per_unit[site])
    images = images_for(vit)
    expected = learner.vit.eval()(images)
    removed = learner.removed_macs(gates).item()
    learned = learner.conclude(LearningData.of(batches))
    shares = {site: 1.0 - gate.mean().item() for site, gate in gates.items()}
    dense = cost_of(vit.shape()).macs
    method.cut_learned(vit, learned, shares)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-5)
    vit.use_fused_attention(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images[:1])
    assert counter.get_total_flops() / 2 == pytest.approx(dense * (1.0 - removed), rel=1e-4)


def trained(vit, batches):
    """A model after a few steps: so far that it still makes mistakes."""
    optimizer = torch.optim.Adam(vit.parameters(), lr=3e-3)
    for images, labels in batches[:25]:
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    return vit


def neuron_masks(vit, batches):
    _, learner = fresh(vit, batches, mask_epochs=1, thresholds="global", smoothness=0.0, newton=3.0)
    run(learner, LearningData.of(batches), 1, seed=0)

    def ranks(classes):
        learner.method = load_method("x_pruner", classes=classes, thresholds="global")
        return learner.importance()["blocks.2.mlp.neuron"].argsort().argsort()

    return learner.masks.values[-1].detach(), ranks


@torch.no_grad()
def logit_directions(vit):
    """[24, 5]: what the residual stream must gain for one logit to rise."""
    return torch.linalg.pinv(vit.vit.head.weight)


def test_pure_noise_goes_first(tiny) -> None:
    batches = budget_batches(100)
    vit = trained(tiny(), batches)
    block, features, noise = vit.blocks[-1], [], [5, 50]
    with torch.no_grad():
        handle = block.norm2.register_forward_hook(lambda m, i, out: features.append(out[:, 0]))
        for images, _ in batches:
            vit(images)
        handle.remove()
        found, labels = torch.cat(features), torch.cat([lab for _, lab in batches])
        means = torch.stack([found[labels == c].mean(0) for c in range(5)])
        basis, _ = torch.linalg.qr(means.t(), mode="reduced")
        blind = torch.randn(24)
        blind -= basis @ (basis.t() @ blind)  # says nothing about the class
        # GELU(z) - GELU(-z) = z: two neurons that together write a noise of mean zero. One alone
        # would write a constant too, which a class-wise mask can use to spell out the label.
        blind = 4.0 * blind / (found @ blind).std()
        column = logit_directions(vit) @ torch.randn(5)
        block.mlp.fc1.weight[noise] = torch.stack([blind, -blind])
        block.mlp.fc1.bias[noise] = torch.stack([-means.mean(0) @ blind, means.mean(0) @ blind])
        block.mlp.fc2.weight[:, noise] = torch.stack([column, -column], dim=1)
    _, ranks = neuron_masks(vit, batches)
    assert (ranks(())[noise] < 10).all()  # of 96


def test_what_one_class_needs_lives_and_dies_with_that_class(tiny) -> None:
    batches, needed = budget_batches(100), 9
    vit = trained(tiny(), batches)
    mlp, head = vit.blocks[-1].mlp, vit.vit.head
    with torch.no_grad():  # a neuron that is always on and means class 2, which the head discounts
        mlp.fc1.weight[needed], mlp.fc1.bias[needed] = 0.0, 1.0
        before = vit(batches[0][0])
        mlp.fc2.weight[:, needed] = 3.0 * logit_directions(vit) @ (torch.eye(5)[2] - 0.2)
        head.bias -= (vit(batches[0][0]) - before).mean(0)
    mask, ranks = neuron_masks(vit, batches)
    others = [c for c in range(5) if c != 2]
    assert mask[2, needed] > 1.2
    assert mask[2, needed] > mask[others, needed].max() + 0.5
    assert ranks((2,))[needed] > 80
    assert ranks((0, 1, 3, 4))[needed] < 15


@pytest.mark.slow
def test_class_wise_masks_show_classes_and_a_subset_beats_a_blind_ranking(tiny) -> None:
    batches, wanted = budget_batches(60), (0, 3)
    vit = trained(tiny(), batches)
    options = {"units": ("neuron",), "thresholds": "global", "mask_epochs": 1}
    blind = load_method("x_pruner", **options)
    halves = [blind.learn(vit, LearningData.of(data)) for data in (batches[:30], batches[30:])]
    for first, second in zip(*(half.by_class.values() for half in halves), strict=True):
        by_class = torch.stack([(m - m.mean(0)).flatten() for m in (first, second)])
        assert torch.corrcoef(by_class)[0, 1] > 0.9  # other images, the same picture
        assert by_class.std() > 3.0 * (by_class[0] - by_class[1]).std()
    shares = dict.fromkeys(blind.sites(vit.shape()), 0.7)

    @torch.no_grad()
    def loss(scores, of) -> float:
        cut, losses = copy.deepcopy(vit), []
        blind.cut(cut, scores, shares)
        for images, labels in batches[30:]:
            chosen = torch.isin(labels, torch.tensor(of))
            logits = cut(images[chosen])
            losses.append(F.cross_entropy(logits, labels[chosen], reduction="none"))
        return torch.cat(losses).mean().item()

    subset = load_method("x_pruner", classes=wanted, **options)
    scores = subset.score(vit, batches[:30])
    assert loss(scores, wanted) < 0.8 * loss(halves[0].scores, wanted)
    assert loss(scores, range(5)) > loss(halves[0].scores, range(5))
    generator = torch.Generator().manual_seed(6)
    random = [{s: torch.rand(96, generator=generator) for s in shares} for _ in range(5)]
    assert loss(halves[0].scores, range(5)) < min(loss(each, range(5)) for each in random)


def test_global_ranking_takes_one_cutoff_and_no_weights(tiny, batches) -> None:
    vit = tiny()
    method = load_method("x_pruner", thresholds="global", mask_epochs=1)
    learned = method.learn(vit, LearningData.of(batches))
    assert not learned.weights
    shape = vit.shape()
    budget = 0.7 * cost_of(shape).effective_macs
    shares = method.allocate(shape, learned.scores, budget)
    cut = [s.sort().values[: round(shares[site] * len(s))] for site, s in learned.scores.items()]
    kept = [s.sort().values[round(shares[site] * len(s)) :] for site, s in learned.scores.items()]
    limit = torch.cat(cut).max()
    assert all(k.min() >= limit or len(k) == 1 for k in kept)


@pytest.mark.parametrize("thresholds", ["learned", "global"])
def test_masks_by_class_are_what_the_ranking_sums(thresholds: str, tiny, batches) -> None:
    vit = tiny()
    method = load_method("x_pruner", thresholds=thresholds, mask_epochs=2, epochs=1)
    learned = method.learn(vit, LearningData.of(batches))
    assert learned.by_class.keys() == learned.scores.keys()
    for site, masks in learned.by_class.items():
        assert masks.shape == (5, len(learned.scores[site]))
        assert masks.std(0).max() > 0.0  # classes differ
        order = masks.sum(0).abs()
        low, high = order.argmin(), order.argmax()
        assert learned.scores[site][low] < learned.scores[site][high]


def test_wrong_options_are_refused(tiny, batches) -> None:
    with pytest.raises(ValueError, match="classes of x_pruner has 7; give classes below 5"):
        fresh(tiny(), batches, classes=(1, 7))
    for options in ({"thresholds": "x"}, {"smooth_over": "x"}, {"mask_epochs": 0}, {"epochs": 0}):
        with pytest.raises(ValueError, match=f"option {next(iter(options))} of x_pruner is"):
            load_method("x_pruner", **options)
