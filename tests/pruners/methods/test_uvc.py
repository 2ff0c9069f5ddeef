from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruners import cost_of, load_method
from pruners.model.surgery import keep_heads, remove_attention, remove_mlp
from pruners.model.tokens import Tokens
from pruners.model.vit import Block
from pruners.training.learner import LearningData, run
from pruners.training.optimisation import distillation
from tests.models import images_for


def fresh(vit, batches, **options):
    method = load_method("uvc", **options)
    return method, method.learner(copy.deepcopy(vit).requires_grad_(True), LearningData.of(batches))


def in_float32(learner):
    learner.autocast = None
    return learner.eval()


def easy_batches(count: int = 40):
    """Images whose class is their brightness, so that there is something to keep."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (count, 16), generator=generator)
    noise = torch.randn(count, 16, 3, 24, 16, generator=generator)
    return [(n + lab.view(-1, 1, 1, 1) - 2.0, lab) for n, lab in zip(noise, labels, strict=True)]


@torch.no_grad()
def remove(learner, index: int, heads: int, dims: list[int], neurons: int) -> None:
    """Set the numbers of groups that go from a block."""
    groups = learner.blocks[index].groups
    for name, count in (("heads", heads), ("dims", dims), ("neurons", neurons)):
        counts = torch.tensor(count, dtype=torch.float32)
        groups[name].fraction.copy_(counts / groups[name].units)


def cut_differently(learner) -> None:
    """Another number of every group in every block, and the middle block skipped."""
    remove(learner, 0, 1, [3, 0, 5], 40)
    remove(learner, 1, 0, [2, 7, 1], 10)
    remove(learner, 2, 2, [4, 6, 2], 71)
    with torch.no_grad():
        learner.gates[1] = torch.tensor([0.7, -0.2])


def flops(vit, images) -> float:
    vit.use_fused_attention(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images)
    return counter.get_total_flops() / 2


# Check 1: nothing removed.


def test_nothing_removed_is_the_dense_model_and_the_formula_is_the_flop_counter(
    tiny, batches
) -> None:
    vit, images = tiny(), images_for(tiny(), 1)
    _, learner = fresh(vit, batches)
    assert learner.remaining().item() == pytest.approx(1.0, abs=1e-6)
    learner.prepare(gating=False, masked=False)
    assert torch.equal(learner.eval().vit.vit(images), vit(images))
    learner.prepare(gating=False, masked=True)
    assert torch.equal(learner.vit.vit(images), vit(images))
    dense = flops(vit, images)
    assert dense == cost_of(vit.shape()).macs
    for index in range(3):  # equal in all heads, so that kernels run no padding
        remove(learner, index, index, [index + 1] * 3, 20 * index)
    method = learner.method
    remaining = learner.remaining().item()
    learned = learner.conclude(LearningData.of(batches))
    shares = {site: (m < 0).double().mean().item() for site, m in learned.scores.items()}
    method.cut_learned(vit, learned, shares)
    assert [(b.heads, b.v_dim, b.hidden) for b in vit.shape().blocks] == [
        (3, 7, 96),
        (2, 6, 76),
        (1, 5, 56),
    ]
    assert remaining == pytest.approx(flops(vit, images) / dense, rel=1e-5)


# Check 2: R and its slopes.


def test_less_is_left_with_every_fraction_and_more_with_every_gate(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    cut_differently(learner)
    with torch.no_grad():
        learner.gates[1] = torch.tensor([-0.2, 0.7])
    fractions = learner._fractions
    slopes = torch.autograd.grad(learner.remaining(), [*fractions, learner.gates])
    assert all((slope <= 0.0).all() for slope in slopes[:-1])
    assert all(slope.item() < 0.0 for slope in slopes[:-1] if slope.dim() == 0)
    assert (slopes[-1][:, 1] > 0.0).all()
    assert (slopes[-1][:, 0] < 0.0).all()
    before = learner.remaining().item()
    for fraction in fractions:
        for place in range(fraction.numel()):
            kept = fraction.detach().clone()
            with torch.no_grad():
                fraction.view(-1)[place] += 0.13
                learner.project()
                assert learner.remaining().item() <= before + 1e-7
                fraction.copy_(kept)
    for index in range(3):
        with torch.no_grad():
            learner.gates[index] = learner.gates[index].flip(0)
            assert learner.remaining().item() < before - 0.05
            learner.gates[index] = learner.gates[index].flip(0)


# Check 3: the proximal step.


def test_the_proximal_step_shrinks_exactly_what_goes(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    remove(learner, 1, 1, [3, 0, 5], 40)
    block = learner.blocks[1]
    with torch.no_grad():
        block.groups["heads"].dual.fill_(0.7)
        block.groups["dims"].dual.copy_(torch.tensor([0.1, 0.2, 0.4]))
        block.groups["neurons"].dual.fill_(0.3)
    before = copy.deepcopy(learner.vit.state_dict())
    proj, fc2 = block.block.attn.proj.weight.clone(), block.block.mlp.fc2.weight.clone()
    block.shrink(0.5)
    columns = proj.square().sum(0).view(3, 8)
    factors = torch.ones(3, 8)
    factors[columns.sum(1).argmin()] /= 1.0 + 2.0 * 0.5 * 0.7
    for head, (count, dual) in enumerate(((3, 0.1), (0, 0.2), (5, 0.4))):
        factors[head, columns[head].argsort()[:count]] /= 1.0 + 2.0 * 0.5 * dual
    torch.testing.assert_close(block.block.attn.proj.weight, proj * factors.flatten())
    same = (factors == 1.0).flatten()
    assert 0 < same.sum() < 24
    assert torch.equal(block.block.attn.proj.weight[:, same], proj[:, same])
    gone = torch.zeros(96, dtype=torch.bool)
    gone[fc2.square().sum(0).argsort()[:40]] = True
    torch.testing.assert_close(block.block.mlp.fc2.weight[:, gone], fc2[:, gone] / 1.3)
    assert torch.equal(block.block.mlp.fc2.weight[:, ~gone], fc2[:, ~gone])
    moved = {n for n, t in learner.vit.state_dict().items() if not torch.equal(t, before[n])}
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in moved if "rank" not in name} == {
        "proj",
        "fc2",
    }


# Check 4: multipliers, and the budget.


def test_multipliers_stay_positive_and_the_price_follows_the_gap(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, budget=0.6)
    learner.ascend(1.0)
    rising = learner.price.item()
    assert rising > 1e-3
    cut_differently(learner)  # far below the budget
    assert learner.remaining().item() < 0.5
    learner.ascend(1.0)
    assert learner.price.item() < rising
    for _ in range(200):
        learner.ascend(1.0)
    assert learner.price.item() == 0.0
    duals = torch.cat([group.dual.flatten() for _, _, group in learner._groups])
    assert (duals >= 1e-3).all()
    assert duals.max() > 1e-2  # what is removed still has a norm


def test_the_price_climbs_ever_faster(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, budget=0.01, width_lr=0.0, units=("neuron",))
    rises = []
    for part in range(5):
        before = learner.price.item()
        learner.step(*batches[0], 0.1 * part + 0.05)
        rises.append(learner.price.item() - before)
    assert [rise / rises[0] for rise in rises] == pytest.approx([1, 5, 9, 13, 17], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_the_budget_is_met_with_hard_gates_and_whole_groups(tiny, budget: float) -> None:
    vit, method = tiny(), load_method("uvc", epochs=2, budget=budget)
    learned = method.learn(vit, LearningData.of(easy_batches()))
    report = learned.report
    assert abs(report["remaining_macs"] - budget) <= 0.02
    assert report["saved_by_width"] > 0.02
    total = report["remaining_macs"] + report["saved_by_width"] + report["saved_by_blocks"]
    assert total == pytest.approx(1.0)
    shares = [(m < 0).float().mean().item() for s, m in learned.scores.items() if "neuron" in s]
    assert max(shares) - min(shares) > 0.02


# Check 5: the slope of A.


def test_the_slope_of_the_removed_norm_is_the_next_order_statistic(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    block = learner.blocks[2]
    columns = block.block.attn.proj.weight.detach().square().sum(0).view(3, 8)
    neurons = block.block.mlp.fc2.weight.detach().square().sum(0).sort().values

    def removed(heads: int, dims: list[int], hidden: int):
        remove(learner, 2, heads, dims, hidden)
        return block.removed_norms()

    here, there = removed(1, [3, 0, 5], 40), removed(2, [4, 1, 6], 41)
    assert here["neurons"].item() == pytest.approx((neurons[:40].sum() / neurons.sum()).item())
    removed(1, [3, 0, 5], 40)
    for name, norm in block.removed_norms().items():
        group = block.groups[name]
        (slope,) = torch.autograd.grad(norm.sum(), group.fraction)
        torch.testing.assert_close(
            slope / group.units, (there[name] - here[name]).detach(), rtol=1e-3, atol=1e-6
        )
    ordered = columns.sort(dim=1).values
    next_dims = torch.stack([ordered[0, 3], ordered[1, 0], ordered[2, 5]]) / columns.sum()
    torch.testing.assert_close((there["dims"] - here["dims"]).detach(), next_dims)


# Check 6: masks and surgery.


def test_masked_and_skipped_equals_surgery_and_the_cut_costs_what_was_learned(
    tiny, batches
) -> None:
    vit, images = tiny(), images_for(tiny())
    method, learner = fresh(vit, batches)
    cut_differently(learner)
    learner.prepare(gating=False, masked=True)
    expected = learner.eval().vit.vit(images)
    assert (expected - vit(images)).abs().max() > 1e-2
    remaining = learner.remaining().item()
    learned = learner.conclude(LearningData.of(batches))
    shape = vit.shape()
    dense = cost_of(shape).effective_macs
    reached = learned.report["remaining_macs"]
    assert reached == pytest.approx(remaining, abs=1e-6)
    shares = method.allocate(shape, learned.scores, reached * dense)
    method.cut_learned(vit, learned, shares)
    assert [(b.heads, b.hidden) for b in vit.shape().blocks] == [(2, 56), (0, 0), (1, 25)]
    assert cost_of(vit.shape()).effective_macs == pytest.approx(reached * dense)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-5)


def test_a_removed_head_goes_whole_and_comes_back_last(tiny, batches) -> None:
    vit = tiny()
    _, learner = fresh(vit, batches)
    cut_differently(learner)
    weakest = learner.blocks[0].norms()["heads"].argmin().item()
    learned = learner.conclude(LearningData.of(batches))
    margins = [learned.scores[f"blocks.0.attn.heads.{h}.v_dim"] for h in range(3)]
    assert len(set(margins[weakest].tolist())) == 1
    assert margins[weakest].max() < min(m.min() for h, m in enumerate(margins) if h != weakest)
    assert margins[weakest].max() < -1.0
    counts = [int((m < 0).sum()) for m in margins]
    expected = [3, 0, 5]
    expected[weakest] = 8
    assert counts == expected


# Check 7: both mechanisms.


def test_width_alone_meets_the_budget_and_parameters_go_too(tiny) -> None:
    method = load_method("uvc", epochs=2, units=("ragged_v_dim", "neuron"))
    learned = method.learn(tiny(), LearningData.of(easy_batches()))
    assert not any(site.endswith("block") for site in learned.scores)
    assert learned.report["saved_by_blocks"] == learned.report["blocks_skipped"] == 0.0
    assert abs(learned.report["remaining_macs"] - 0.5) <= 0.02
    assert learned.report["remaining_params"] < 0.75


@pytest.mark.slow
def test_gates_alone_skip_what_the_budget_asks_for_and_no_more(tiny) -> None:
    vit = tiny()
    one_less = 1.0 - 0.999 * block_share(vit.shape())
    for budget, skipped in ((one_less - 1e-3, 1), (one_less - 0.2, 1)):
        method = load_method("uvc", epochs=2, units=("block",), budget=budget)
        learned = method.learn(vit, LearningData.of(easy_batches(30)))
        assert learned.report["blocks_skipped"] == skipped
        assert learned.report["saved_by_width"] == pytest.approx(0.0)
        assert learned.report["remaining_macs"] == pytest.approx(one_less, abs=0.02)
        assert learned.report["remaining_params"] < 0.75  # skipped blocks really go


def block_share(shape) -> float:
    less = dataclasses.replace(shape.blocks[0], heads=0, hidden=0, qk_dim=0, v_dim=0)
    cut = dataclasses.replace(shape, blocks=(less, *shape.blocks[1:]))
    return 1.0 - cost_of(cut).effective_macs / cost_of(shape).effective_macs


@pytest.mark.slow
def test_the_block_that_does_nothing_is_the_one_skipped(tiny) -> None:
    vit, batches = tiny(), easy_batches()
    idle = vit.blocks[1]
    with torch.no_grad():
        for parameter in (*idle.attn.proj.parameters(), *idle.mlp.fc2.parameters()):
            parameter.mul_(1e-3)
    idle.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in vit.parameters() if p.requires_grad], lr=3e-3)
    for images, labels in batches:  # until the other blocks matter
        optimizer.zero_grad()
        nn.functional.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    method = load_method("uvc", epochs=2, lr=1e-6, budget=0.6)
    learned = method.learn(vit, LearningData.of(batches))
    leads = {s: m.item() for s, m in learned.scores.items() if s.endswith("block")}
    assert min(leads, key=leads.__getitem__) == "blocks.1.block"
    assert leads["blocks.1.block"] < 0.0


def test_skipping_that_would_undershoot_is_taken_back(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, budget=0.5)
    with torch.no_grad():
        learner.gates.copy_(torch.tensor([[0.4, -0.4], [-1.0, 1.0], [0.9, -0.7]]))
    learner.project()
    lead = (learner.gates[:, 1] - learner.gates[:, 0]).tolist()
    assert lead == pytest.approx([0.0, 2.0, -1.6])  # both would leave less than half
    assert learner.opened().bool().tolist() == [True, True, False]


# Check 8: the teacher, and the gates' formula.


def test_the_teacher_is_frozen_and_the_student_equals_it_at_first(tiny, batches) -> None:
    vit = tiny(init_values=0.3, drop_path_rate=0.2, proj_drop_rate=0.1)
    method, learner = fresh(vit, batches, distill=0.3)
    learner.train()
    assert learner.vit.training
    assert not any(module.training for module in learner.teacher.modules())
    assert not any(p.requires_grad for p in learner.teacher.parameters())
    owned = [p for o in learner.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert not {id(p) for p in owned} & {id(p) for p in learner.teacher.parameters()}
    in_float32(learner)
    learner.prepare(gating=False, masked=False)
    images, labels = batches[0]
    cross_entropy = nn.functional.cross_entropy(vit(images), labels)
    torch.testing.assert_close(learner.loss(images, labels), 0.7 * cross_entropy)
    before = copy.deepcopy(learner.teacher.state_dict())
    run(learner, LearningData.of(batches), 1, seed=0)
    assert all(torch.equal(t, before[n]) for n, t in learner.teacher.state_dict().items())
    learner.eval()
    learner.prepare(gating=False, masked=False)
    student = learner.vit.vit(images)
    divergence = distillation(student, vit(images), method.temperature)
    assert divergence > 1e-3
    torch.testing.assert_close(
        learner.loss(images, labels),
        0.7 * nn.functional.cross_entropy(student, labels) + 0.3 * divergence,
    )


def test_a_gate_mixes_the_whole_block_with_the_identity(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    block, x = learner.blocks[1], torch.randn(2, 7, 24)
    block.gate = torch.tensor(0.3)
    torch.testing.assert_close(block(x), 0.3 * block.block(Tokens(x)).x + 0.7 * x)
    learner.prepare(gating=True, masked=False)
    mix = torch.stack([b.gate for b in learner.blocks])
    assert ((mix > 0.0) & (mix < 1.0)).all()
    assert len(set(mix.tolist())) == 3
    (slope,) = torch.autograd.grad(learner.loss(*batches[0]), learner.gates)
    torch.testing.assert_close(slope[:, 0], -slope[:, 1])
    assert (slope != 0.0).all()


# The run.


def test_gates_wait_and_masks_come_last(tiny) -> None:
    _, learner = fresh(tiny(), easy_batches(2), gates_from=0.2, coarse_until=0.4, masked=0.4)
    batch = easy_batches(1)[0]

    def moved(progress: float) -> dict[str, bool]:
        groups = {name: group for _, name, group in learner._groups}  # those of the last block
        before = {n: g.fraction.detach().clone() for n, g in groups.items()}
        gates = learner.gates.detach().clone()
        learner.step(*batch, progress)
        changes = {n: not torch.equal(before[n], g.fraction) for n, g in groups.items()}
        return changes | {"gates": not torch.equal(gates, learner.gates)}

    everything = dict.fromkeys(("heads", "dims", "neurons", "gates"), True)
    assert moved(0.1) == everything | {"gates": False}
    assert moved(0.3) == everything
    assert moved(0.5) == everything | {"gates": False, "heads": False}
    assert all(gate.value is None for slots in learner._slots for gate in slots.values())
    ranks = [group.rank.clone() for _, _, group in learner._groups]
    assert moved(0.7) == dict.fromkeys(everything, False)
    assert all(torch.equal(r, g.rank) for r, (_, _, g) in zip(ranks, learner._groups, strict=True))
    values = [gate.value for slots in learner._slots for gate in slots.values()]
    assert all(((v == 0.0) | (v == 1.0)).all() for v in values)
    assert any((v == 0.0).any() for v in values)


def test_nothing_of_the_run_is_left_in_the_model(tiny, batches) -> None:
    vit = tiny()
    method, learner = fresh(vit, batches)
    run(learner, LearningData.of(batches), method.total_epochs(), seed=0)
    learned = learner.conclude(LearningData.of(batches))
    assert [type(m) for m in learner.vit.modules()] == [type(m) for m in vit.modules()]
    assert all(isinstance(block, Block) for block in learner.vit.vit.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.vit.modules())
    assert set(learned.weights) == set(vit.vit.state_dict())


def test_blocks_may_lack_heads_or_a_branch(tiny, batches) -> None:
    vit = tiny()
    keep_heads(vit.blocks[0].attn, torch.tensor([0, 2]))
    remove_attention(vit.blocks[1])
    remove_mlp(vit.blocks[2])
    method, learner = fresh(vit, batches)
    assert learner.remaining().item() == pytest.approx(1.0, abs=1e-6)
    run(learner, LearningData.of(batches), method.total_epochs(), seed=0)
    remaining = learner.remaining().item()
    learned = learner.conclude(LearningData.of(batches))
    assert set(learned.scores) == set(method.sites(vit.shape()))
    assert learned.report["remaining_macs"] == pytest.approx(remaining, abs=1e-6)


def test_distillation_can_be_left_out(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, distill=0.0)
    assert learner.teacher is None
    in_float32(learner)
    images, labels = batches[0]
    expected = nn.functional.cross_entropy(learner.vit.vit(images), labels)
    torch.testing.assert_close(learner.loss(images, labels), expected)


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("distill", 1.5, "from 0 to 1"),
        ("masked", -0.1, "from 0 to 1"),
        ("temperature", 0.0, "at least 0.1"),
        ("price_lr", float("nan"), "at least 0"),
        ("coarse_until", 0.6, "gates_from = 0.15 to 1 - masked = 0.5"),
        ("coarse_until", 0.1, "gates_from = 0.15 to 1 - masked = 0.5"),
        ("budget", 1.0, "0 < budget < 1"),
        ("units", ("head",), "ragged_v_dim"),
    ],
)
def test_wrong_options_are_refused(option: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} of uvc is .*{right}"):
        load_method("uvc", **{option: value})
