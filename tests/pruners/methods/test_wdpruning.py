from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pruners import PrunableViT, cost_of, load_method
from pruners.families.allocation import same_share
from pruners.model.gates import Gate, remaining_weights, remove_gates
from pruners.model.rank_masks import kept_count, rank_mask, ranks
from pruners.training.learner import LearningData, run
from tests.models import VARIANTS, images_for

Batches = list[tuple[Tensor, Tensor]]


def fresh(vit: PrunableViT, batches: Batches, **options):
    """A learner at the start of a run on a copy."""
    method = load_method("wdpruning", **options)
    return method, method.learner(copy.deepcopy(vit), LearningData.of(batches))


@torch.no_grad()
def scatter(learner) -> None:
    """Give every unit another score and every site another threshold; some sites lose most."""
    generator = torch.Generator().manual_seed(7)
    learner.scores.copy_(torch.randn(learner.scores.shape, generator=generator))
    learner.thresholds.copy_(2.0 * torch.randn(learner.thresholds.shape, generator=generator))


def masks(learner) -> dict[str, Tensor]:
    return {
        site: rank_mask(scores, beta, ties).detach()
        for site, scores, beta, ties in learner.by_site()
    }


def shares(learner, depth: int) -> dict[str, float]:
    """Learned shares, and all blocks beyond a depth."""
    found = {site: 1.0 - mask.mean().item() for site, mask in masks(learner).items()}
    blocks = range(len(learner.vit.blocks))
    return found | {f"blocks.{i}.block": float(i >= depth) for i in blocks}


def bright_batches(count: int, seed: int = 4) -> Batches:
    """Images whose class is their brightness, so that there is something to keep."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count, 16), generator=generator)
    noise = torch.randn(count, 16, 3, 24, 16, generator=generator)
    return [(n + lab.view(-1, 1, 1, 1) - 2.0, lab) for n, lab in zip(noise, labels, strict=True)]


def trained(vit: PrunableViT, batches: Batches) -> PrunableViT:
    optimizer = torch.optim.Adam(vit.parameters(), lr=3e-3)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    return vit


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_start_everything_is_kept_and_nothing_changes(variant, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    images = images_for(vit)
    _, learner = fresh(vit, [(images, torch.tensor([0, 3, 1]))])
    learner.eval().mask()
    assert all(mask.all() for mask in masks(learner).values())
    assert torch.equal(learner.logits(images)[3], vit(images))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_masked_equals_cut_at_every_exit(variant: str, depth: int, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    images = images_for(vit)
    batches = [(images, torch.tensor([0, 3, 1]))]
    method, learner = fresh(vit, batches)
    scatter(learner)
    with torch.no_grad():  # exits are as random as the rest of the model
        for parameter in learner.exits.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    learner.eval().mask()
    expected, cut = learner.logits(images)[depth], shares(learner, depth)
    assert 0.2 < learner.remaining() < 0.8
    learned = learner.conclude(LearningData.of(batches))
    method.cut_learned(vit, learned, cut)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-5)
    assert cost_of(vit.shape()).params < cost_of(tiny(**VARIANTS[variant]).shape()).params


def test_a_distilled_model_has_two_classifiers_at_its_exits_too(tiny, batches) -> None:
    from timm.models.deit import VisionTransformerDistilled

    args = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    vit = PrunableViT(VisionTransformerDistilled(**args, num_classes=5)).eval()
    images = images_for(vit)
    method, learner = fresh(vit, batches)
    scatter(learner)
    learner.eval().mask()
    expected, cut = learner.logits(images)[2], shares(learner, 2)
    learned = learner.conclude(LearningData.of(batches))
    assert "exits.2.head_dist.weight" in learned.weights
    method.cut_learned(vit, learned, cut)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-5)


def test_a_mask_leaves_nothing_of_a_row_and_its_bias(tiny) -> None:
    vit = tiny()
    _, learner = fresh(vit, [(images_for(vit), torch.tensor([0, 3, 1]))])
    scatter(learner)
    learner.eval().mask()
    kept, images = masks(learner), images_for(vit)
    before = learner.logits(images)[3]
    with torch.no_grad():
        for i, block in enumerate(learner.vit.blocks):
            head = kept[f"blocks.{i}.attn.head"].repeat_interleave(8).repeat(3)
            for layer, mask in (
                (block.attn.qkv, head),
                (block.attn.proj, kept[f"blocks.{i}.attn.attn_out"]),
                (block.mlp.fc1, kept[f"blocks.{i}.mlp.neuron"]),
                (block.mlp.fc2, kept[f"blocks.{i}.mlp.mlp_out"]),
            ):
                assert mask.sum() > 0
                layer.weight[mask == 0] = 9.0  # whatever stands in a masked row does not count
                layer.bias[mask == 0] = -7.0
    assert any((mask == 0).any() for mask in kept.values())
    torch.testing.assert_close(learner.logits(images)[3], before, rtol=0, atol=1e-5)


def test_kept_sets_are_nested_and_as_large_as_the_threshold_says() -> None:
    scores, ties = torch.tensor([0.3, -1.0, 0.3, 2.0, 0.3, -4.0, 0.0]), torch.randperm(7)
    kept = torch.ones(7)
    for beta in (10.0, 3.0, 1.0, 0.4, -0.3, -1.0, -2.0, -30.0):
        mask = rank_mask(scores, torch.tensor(beta), ties)
        count = max(1, -(-7 * torch.sigmoid(torch.tensor(beta)).item() // 1))
        assert mask.sum() == count == kept_count(torch.tensor(beta), 7)
        assert (mask <= kept).all()
        assert scores[mask == 1].min() >= scores[mask == 0].max() if count < 7 else True
        kept = mask
    assert kept.tolist() == [0, 0, 0, 1, 0, 0, 0]  # the last one is the highest, signed, score


def test_ties_break_by_the_permutation_and_ranks_are_no_sort_order() -> None:
    ties = torch.tensor([2, 0, 3, 1])
    assert ranks(torch.zeros(4), ties).tolist() == [1, 3, 0, 2]
    assert ranks(torch.tensor([0.5, 0.7, -1.0, 0.6]), ties).tolist() == [1, 3, 0, 2]
    assert ranks(torch.tensor([0.7, 0.6, 0.5, 0.7]), ties).tolist() == [2, 1, 0, 3]


def test_gradient_of_scores_is_that_of_the_masks_even_where_masked(tiny) -> None:
    vit = tiny()
    images, labels = images_for(vit, 6), torch.tensor([0, 3, 1, 4, 2, 2])
    _, learner = fresh(vit, [(images, labels)], units=("neuron",))
    scatter(learner)
    learner.eval().mask()
    block, seen = learner.vit.blocks[1], {}

    def remember(module, inputs, output) -> None:
        seen["x"], seen["a"] = inputs[0].detach(), output.detach()

    handle = block.mlp.fc1.register_forward_hook(remember)
    F.cross_entropy(learner.logits(images)[3], labels).backward()
    handle.remove()
    grads = dict(zip(learner.sites, learner.scores.grad.split([96] * 3), strict=True))
    site = "blocks.1.mlp.neuron"

    # The same once more with the masked rows, a' = mask * (W x + b), as a leaf: dL/da'.
    remove_gates(learner.vit)
    masked = dict(masks(learner).items())
    leaf = (seen["a"] * masked[site]).requires_grad_()
    handles = [
        b.mlp.fc1.register_forward_hook(
            lambda m, i, out, n=n: leaf if n == 1 else out * masked[f"blocks.{n}.mlp.neuron"]
        )
        for n, b in enumerate(learner.vit.blocks)
    ]
    loss = F.cross_entropy(learner.logits(images)[3], labels)
    (outer,) = torch.autograd.grad(loss, leaf)
    for handle in handles:
        handle.remove()
    weight, bias = block.mlp.fc1.weight.detach(), block.mlp.fc1.bias.detach()
    expected = torch.einsum("bnf,fd,bnd->f", outer, weight, seen["x"])
    expected += torch.einsum("bnf,f->f", outer, bias)
    torch.testing.assert_close(grads[site], expected, rtol=1e-4, atol=1e-7)
    out = masked[site] == 0
    assert out.any()
    assert (grads[site][out] != 0).all()
    index = list(learner.sites).index(site)
    torch.testing.assert_close(
        learner.thresholds.grad[index], expected[~out].sum(), rtol=1e-4, atol=1e-6
    )


def test_budget_pushes_thresholds_down_only_above_it(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, budget=0.5)
    with torch.no_grad():
        learner.thresholds.fill_(1.7)
        learner.multipliers.copy_(torch.tensor([0.3, 2.0]))
    remaining = learner.remaining()
    assert remaining > 0.6
    learner.budget_loss(remaining).backward()
    slopes = dict(zip(learner.sites, learner.thresholds.grad.tolist(), strict=True))
    assert min(slopes.values()) > 0.0
    # The larger the matrices that lose rows and columns, the larger the gradient.
    assert slopes["blocks.1.mlp.neuron"] > slopes["blocks.1.mlp.mlp_out"]
    assert slopes["blocks.1.mlp.mlp_out"] > slopes["blocks.1.attn.attn_out"]
    gap = remaining.item() - 0.5
    loss = learner.budget_loss(learner.remaining()).item()
    assert loss == pytest.approx(0.3 * gap + 2.0 * gap**2, rel=1e-5)
    learner.thresholds.grad = None
    with torch.no_grad():
        learner.thresholds.fill_(-0.5)
    assert learner.remaining() < 0.5
    learner.budget_loss(learner.remaining()).backward()
    assert not learner.thresholds.grad.any()


def test_multipliers_start_at_zero_and_rise_only_above_the_budget(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, budget=0.5)
    assert learner.budget_loss(torch.tensor(0.9)) == 0.0
    learner.step(*batches[0], 0.0)
    seen = [torch.zeros(2), learner.multipliers.clone()]
    for remaining in (0.9, 0.6, 0.51):
        learner.ascend(torch.tensor(remaining))
        seen.append(learner.multipliers.clone())
    assert all((later > earlier).all() for earlier, later in itertools.pairwise(seen))
    learner.ascend(torch.tensor(0.5))
    learner.ascend(torch.tensor(0.1))
    assert torch.equal(learner.multipliers, seen[-1])


def block_weights(vit: PrunableViT) -> int:
    return sum(layer.weight.numel() for _, layer in vit.linears())


def test_formula_equals_the_weights_of_what_surgery_leaves(tiny, batches) -> None:
    dense = tiny(num_heads=4, mlp_ratio=3.0)  # 4 heads of width 6, 72 neurons
    vit = copy.deepcopy(dense)
    narrow = load_method("grouped")
    some = {"blocks.0.attn.head": 0.5, "blocks.1.mlp.neuron": 0.4, "blocks.2.attn.head": 1.0}
    narrow.cut(vit, narrow.score(vit, batches), some)  # blocks of different widths, one a branch
    method, learner = fresh(vit, batches)
    assert learner.remaining() == 1.0
    scatter(learner)
    remaining, cut, before = learner.remaining().item(), shares(learner, 3), block_weights(vit)
    method.cut(vit, learner.conclude(LearningData.of(batches)).scores, cut)
    assert remaining == pytest.approx(block_weights(vit) / before, rel=1e-6)
    assert remaining_weights(dense.shape(), {}) == 1.0


def test_heads_of_another_width_than_64_and_the_papers_twelfths(tiny) -> None:
    fractions = {"head": 0.5, "attn_out": 0.25, "neuron": 0.75, "mlp_out": 0.5}
    shape = tiny().shape()
    sites = load_method("wdpruning").sites(shape)
    given = {s: torch.tensor(fractions[s.split(".")[-1]]) for s in sites if "block" not in s[7:]}
    expected = (3 * 0.5 + 0.5 * 0.25 + 4 * 0.75 + 4 * 0.75 * 0.5) / 12
    assert remaining_weights(shape, given).item() == pytest.approx(expected)


def test_every_exit_trains_the_first_block_and_later_blocks_do_not_change_it(tiny) -> None:
    vit = tiny(depth=4)
    images, labels = images_for(vit), torch.tensor([0, 3, 1])
    _, learner = fresh(vit, [(images, labels)], exits=(1, 3))
    learner.autocast = None
    learner.eval().mask()
    first = learner.vit.blocks[0].mlp.fc1.weight
    logits = learner.logits(images)
    assert list(logits) == [1, 3, 4]
    losses = [F.cross_entropy(each, labels) for each in logits.values()]
    slopes = [torch.autograd.grad(loss, first, retain_graph=True)[0] for loss in losses]
    assert all(slope.abs().max() > 1e-6 for slope in slopes)
    (slope,) = torch.autograd.grad(learner.task_loss(images, labels), first)
    torch.testing.assert_close(slope, slopes[0] + slopes[1] + slopes[2])
    with torch.no_grad():
        for block in learner.vit.blocks[3:]:
            block.mlp.fc2.weight.add_(1.0)
    after = learner.logits(images)
    assert [torch.equal(after[n], logits[n]) for n in (1, 3, 4)] == [True, True, False]


def reached(vit: PrunableViT, batches: Batches, **options) -> tuple[float, Tensor]:
    """E at the end of a run, and its keep fractions of the neurons."""
    method, learner = fresh(vit, batches, **options)
    run(learner, LearningData.of(batches), method.total_epochs(), seed=0)
    fractions = [m.mean() for s, m in masks(learner).items() if s.endswith("neuron")]
    return learner.remaining().item(), torch.stack(fractions)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_the_budget_is_met_and_layers_differ(budget: float, tiny) -> None:
    batches = bright_batches(30)
    vit = trained(tiny(num_heads=12), batches[:25])  # one of 3 heads alone would be 4 % of E
    remaining, fractions = reached(vit, batches, epochs=2, budget=budget)
    assert abs(remaining - budget) <= 0.02
    assert fractions.max() - fractions.min() > 0.05


def test_a_step_across_the_budget_ends_there(tiny, batches) -> None:
    _, learner = fresh(tiny(num_heads=12), batches, budget=0.6)
    scatter(learner)
    with torch.no_grad():
        below = learner.thresholds.clone() - 2.0
        above = below + torch.linspace(3.0, 6.0, len(below))
        for start, end, wanted in ((above, below, 0.6), (above, above - 0.1, None)):
            learner.thresholds.copy_(end)
            unchanged = learner.remaining()
            learner.shorten(start)
            if wanted is None:
                assert learner.remaining() == unchanged > 0.6
            else:
                assert unchanged < 0.5
                assert 0.58 <= learner.remaining() <= 0.6
                way = (start - learner.thresholds) / (start - end)
                assert way.max() - way.min() < 1e-5


def test_without_multipliers_nothing_pushes_to_the_budget(tiny) -> None:
    remaining, _ = reached(tiny(), bright_batches(30), epochs=2, multiplier_lr=0.0)
    assert remaining > 0.7


@pytest.mark.slow
def test_learned_shares_beat_uniform_ones_at_equal_macs(tiny) -> None:
    """Of five models, since the signs of single gradients decide, and a run may go astray."""
    better = []
    for seed in range(4, 9):
        batches = bright_batches(60, seed)
        vit, held_out = trained(tiny(), batches[:30]), batches[40:]
        shape = vit.shape()
        macs = 0.6 * cost_of(shape).effective_macs
        width = ("head", "neuron", "attn_out", "mlp_out")
        method = load_method("wdpruning", units=width, epochs=4, budget=0.6)
        learned = method.learn(vit, LearningData.of(batches[:40]))
        shrink = partial(method.shrink, shape)
        same = same_share(list(method.sites(shape)), shrink, macs, largest=0.99)
        losses = []
        for cut in (method.allocate(shape, learned.scores, macs), same):
            model = copy.deepcopy(vit)
            method.cut_learned(model, learned, cut)  # the same scores and weights
            assert cost_of(model.eval().shape()).effective_macs <= macs
            with torch.no_grad():
                loss = torch.stack([F.cross_entropy(model(x), y) for x, y in held_out]).mean()
            losses.append(loss.item())
        better.append(losses[0] < losses[1])
    assert sum(better) >= 4, better


def test_depth_is_the_shallowest_exit_within_max_drop(tiny, batches) -> None:
    _, learner = fresh(tiny(depth=4), batches, exits=(1, 2, 3), max_drop=2.0)
    learner.top1 = lambda _: {1: 70.0, 2: 78.1, 3: 77.0, 4: 80.0}  # beta starts at 10
    learned = learner.conclude(LearningData.of(batches))
    margins = torch.cat([learned.scores[f"blocks.{i}.block"] for i in range(4)])
    assert (margins > 0).tolist() == [True, True, False, False]
    assert margins.argsort().tolist() == [3, 2, 1, 0]  # the deepest one goes first
    assert learned.report == {
        "remaining_params": 1.0,
        "kept_blocks": 2.0,
        "val_top1": 80.0,
        "val_top1_exit_1": 70.0,
        "val_top1_exit_2": 78.1,
        "val_top1_exit_3": 77.0,
    }


def test_top1_counts_each_exit_by_itself(tiny, batches) -> None:
    vit = tiny()
    _, learner = fresh(vit, batches)
    with torch.no_grad():
        right = sum((vit(x).argmax(1) == y).sum().item() for x, y in batches)
        learner.exits["2"].head.weight.zero_()
        learner.exits["2"].head.bias.copy_(torch.eye(5)[3])  # always class 3
    top1 = learner.top1(batches)
    threes = sum((y == 3).sum().item() for _, y in batches)
    assert list(top1) == [1, 2, 3]
    assert top1[3] == pytest.approx(100 * right / 18)
    assert top1[2] == pytest.approx(100 * threes / 18)
    with pytest.raises(ValueError, match="no validation images"):
        learner.top1([])


def test_margins_are_shares_and_zero_cuts_what_was_learned(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    scatter(learner)
    kept = masks(learner)
    for site, margins in learner.margins().items():
        assert torch.equal(margins > 0, kept[site] == 1)
        steps = margins.sort().values.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / len(margins)))
        assert margins.abs().min() == pytest.approx(0.5 / len(margins), abs=1e-5)


def test_allocation_takes_the_exits_blocks_and_the_cut_its_classifier(tiny, batches) -> None:
    vit = tiny(depth=4)
    method, learner = fresh(vit, batches)
    learner.top1 = lambda _: {2: 80.0, 3: 80.0, 4: 80.0}
    learned = learner.conclude(LearningData.of(batches))
    dense = vit.shape()
    thresholds = method.allocate(dense, learned.scores, 0.4 * cost_of(dense).effective_macs)
    gone = [thresholds.get(f"blocks.{i}.block", 0.0) for i in range(4)]
    assert gone == [0.0, 0.0, 1.0, 1.0]
    for depth, weights in ((2, "exits.2.head.weight"), (4, "head.weight"), (1, "head.weight")):
        cut = copy.deepcopy(vit)
        method.cut_learned(cut, learned, {f"blocks.{i}.block": 1.0 for i in range(4) if i >= depth})
        assert torch.equal(cut.vit.head.weight, learned.weights[weights])
    own = copy.deepcopy(vit)
    method.cut_learned(own, dataclasses.replace(learned, weights={}), thresholds)
    assert torch.equal(own.vit.head.weight, vit.vit.head.weight)


def test_scores_and_thresholds_have_no_weight_decay_and_no_gate_stays(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches)
    decay = {
        id(p): group["weight_decay"]
        for optimizer in learner.optimizers.values()
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decay[id(learner.scores)] == decay[id(learner.thresholds)] == 0.0
    weights = [*learner.vit.parameters(), *learner.exits.parameters()]
    assert [decay[id(p)] for p in weights] == [0.05 if p.ndim > 1 else 0.0 for p in weights]
    assert set(decay) == {id(p) for p in learner.parameters()}
    learner.conclude(LearningData.of(batches))
    assert not any(isinstance(module, Gate) for module in learner.vit.modules())


def test_exits_stand_before_the_last_block_that_is_left(tiny, batches) -> None:
    vit = tiny(depth=5)
    assert list(fresh(vit, batches)[1].exits) == ["3", "4"]
    grouped = load_method("grouped")
    gone = {"blocks.4.attn.head": 1.0, "blocks.4.mlp.neuron": 1.0}
    grouped.cut(vit, grouped.score(vit, batches), gone)
    assert list(fresh(vit, batches)[1].exits) == ["2", "3"]
    assert not fresh(vit, batches, units=("neuron",))[1].exits
    assert not fresh(tiny(depth=1), batches)[1].exits


def test_wrong_options_are_refused(tiny, batches) -> None:
    with pytest.raises(ValueError, match="exits of wdpruning has 3; give some of"):
        fresh(tiny(), batches, exits=(1, 3))
    for options in (
        {"units": ("block",)},
        {"exits": (1,), "units": ("neuron",)},
        {"exits": (0,)},
        {"max_drop": -1.0},
        {"exit_lr": float("nan")},
        {"threshold_lr": -2.0},
        {"multiplier_lr": -1.0},
    ):
        with pytest.raises(ValueError, match=f"option {next(iter(options))} of wdpruning is"):
            load_method("wdpruning", **options)
