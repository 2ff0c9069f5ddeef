from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruners import PrunableViT, cost_of, load_method
from pruners.methods.cait_channels import StraightThroughGate, removed_share
from pruners.model.ranking import slice_scores
from pruners.model.sites import kind_of
from pruners.model.surgery import keep_heads, remove_attention, remove_mlp
from pruners.training.learner import LearningData, run
from tests.models import images_for

WIDE = {"embed_dim": 48, "patch_size": 4}  # 16 dims per head, twice the floor; 25 tokens


class StoppedError(Exception):
    pass


def fresh(vit, batches, **options):
    method = load_method("cait_channels", **options)
    own = copy.deepcopy(vit).requires_grad_(True)
    learner = method.learner(own, LearningData.of(batches))
    learner.autocast = None
    return method, learner.eval()


def finished(vit, batches, **options):
    """A learner at the end of its run."""
    method, learner = fresh(vit, batches, epochs=8, **options)
    run(learner, LearningData.of(batches), method.total_epochs(), seed=0)
    return method, learner.eval()


def with_importance(learner, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    learner.importance.copy_(torch.rand(len(learner.importance), generator=generator))


def masks_of(learner) -> dict[str, Tensor]:
    """Site -> [channels] bool, True where a channel is not masked."""
    lengths = [torch.Size(size).numel() for size in learner.sizes.values()]
    return dict(zip(learner.sizes, learner.unmasked.split(lengths), strict=True))


def section_3_macs(shape) -> int:
    """Multiply-adds by the formula of the method's note, plus what lies outside the blocks."""
    dim = shape.dim
    total = shape.patches * shape.channels * shape.patch[0] * shape.patch[1] * dim
    total += dim * shape.classes
    for b in shape.blocks:
        n, h = b.tokens, b.heads
        total += n * dim * (2 * h * b.qk_dim + 2 * h * b.v_dim)
        total += n**2 * h * (b.qk_dim + b.v_dim) + 2 * n * dim * b.hidden
    return total


def deit_tiny_shape():
    return PrunableViT(VisionTransformer(embed_dim=192, depth=12, num_heads=3)).shape()


def random_scores(method, shape, seed: int = 0) -> dict[str, Tensor]:
    """Positive, of very different size in each site."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for site, units in method.sites(shape).items():
        heads = shape.blocks[int(site.split(".")[1])].heads
        size = (units,) if kind_of(site) == "neuron" else (heads, units)
        scale = 10.0 ** torch.rand((), generator=generator)
        scores[site] = scale * torch.rand(size, generator=generator) ** 2
    return scores


# The gate.


def test_forward_masks_and_backward_does_not() -> None:
    gate = StraightThroughGate(nn.Identity())
    a = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 3, dtype=torch.float64)
    xi = torch.ones(2, 1, 3, dtype=torch.float64, requires_grad=True)
    gate.value, gate.gone = xi, torch.tensor([False, True, False])
    out = gate(a)
    assert torch.equal(out, a.detach() * torch.tensor([1.0, 0.0, 1.0]))
    slope_a, slope_xi = torch.autograd.grad(out, (a, xi), upstream)
    assert torch.equal(slope_a, upstream)  # 1 everywhere, the mask nowhere
    torch.testing.assert_close(slope_xi, (a.detach() * upstream).sum(1, keepdim=True))


def test_what_writes_a_masked_channel_learns_on_until_the_masks_are_frozen(tiny, batches) -> None:
    method, learner = fresh(tiny(**WIDE), batches)
    with_importance(learner)

    def gradients():
        for parameter in learner.vit.parameters():
            parameter.grad = None
        xi = learner.set_gates(6)
        learner.loss(*batches[0]).backward()
        if not learner.frozen:  # masked channels have an importance too
            assert (xi.grad.abs().sum(0) > 0.0).all()
        attn, mlp = learner.vit.blocks[1].attn, learner.vit.blocks[1].mlp
        q, k, v = attn.qkv.weight.grad.abs().sum(1).view(3, 48)
        proj, fc2 = (layer.weight.grad.abs().sum(0) for layer in (attn.proj, mlp.fc2))
        qk_mask, v_mask, mlp_mask = list(masks_of(learner).values())[3:6]  # of block 1
        fc1 = mlp.fc1.weight.grad.abs().sum(1)
        written = torch.cat([q[~qk_mask], v[~v_mask], fc1[~mlp_mask]])
        read = torch.cat([k[~qk_mask], proj[~v_mask], fc2[~mlp_mask]])
        others = torch.cat([q[qk_mask], k[qk_mask], v[v_mask], proj[v_mask], fc2[mlp_mask]])
        assert written.numel() > 100
        assert (others > 0.0).all()
        return written, read

    learner.decide(method.decisions - 1)
    written, read = gradients()
    assert (written > 0.0).all()
    assert not read.any()
    learner.decide(method.decisions)
    written, read = gradients()
    assert not written.any()
    assert not read.any()


# The importance.


def disturbed(vit, batches, **options):
    """A learner in float64 whose student is no longer its teacher."""
    method, learner = fresh(vit.double(), batches, **options)
    with torch.no_grad():
        for parameter in learner.vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method, learner


def losses(student, teacher, images: Tensor, labels: Tensor) -> Tensor:
    """CE + KL / 2 of each image, [B], written out."""
    log_p = student(images).log_softmax(1)
    log_t = teacher(images).log_softmax(1).detach()
    own = -log_p[torch.arange(len(labels)), labels]
    return own + 0.5 * (log_t.exp() * (log_t - log_p)).sum(1)


def test_importance_is_the_mean_size_of_each_images_slope(tiny, batches) -> None:
    """Finite differences on the weights of a model without gates."""
    vit = tiny(**WIDE)
    images, labels = batches[0][0].double(), batches[0][1]
    _, learner = disturbed(vit, batches)
    plain = copy.deepcopy(learner.vit)
    xi = learner.set_gates(len(images))
    learner.loss(images, labels).backward()
    learner.observe(xi.grad)
    scores = learner.scores()
    block, step = plain.blocks[1], 1e-4
    for kind, weight, channel in (
        ("attn.qk_dim", block.attn.qkv.weight[16:32], (1, 5)),
        ("attn.v_dim", block.attn.proj.weight[:, 32:48].t(), (2, 11)),
        ("mlp.neuron", block.mlp.fc2.weight.t(), (70,)),
    ):
        scaled = [weight.detach()[channel[-1]]]
        if kind == "attn.qk_dim":
            scaled.append(block.attn.qkv.bias.detach()[16 + channel[1]])
        kept, sides = [tensor.clone() for tensor in scaled], []
        for factor in (1.0 + step, 1.0 - step):
            for tensor, before in zip(scaled, kept, strict=True):
                tensor.copy_(factor * before)
            with torch.no_grad():
                sides.append(losses(plain, learner.teacher, images, labels))
        for tensor, before in zip(scaled, kept, strict=True):
            tensor.copy_(before)
        expected = ((sides[0] - sides[1]) / (2.0 * step)).abs().mean()
        found = scores[f"blocks.1.{kind}"][channel]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


def test_the_average_forgets(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, ema=0.6)
    channels = len(learner.importance)
    expected = torch.zeros(channels)
    for step, weight in enumerate((1.0, 0.5, 0.4, 0.4), start=1):
        gradient = torch.randn(6, channels)
        learner.observe(gradient)
        # The gradients of a mean over six images: each image's own is six times as large.
        expected = (1.0 - weight) * expected + weight * (6.0 * gradient).abs().mean(0)
        assert int(learner.seen) == step
    torch.testing.assert_close(learner.importance, expected)


def test_clipping_does_not_reach_the_importance_and_idle_channels_go_first(tiny, batches) -> None:
    vit = tiny(**WIDE)
    with torch.no_grad():  # what nothing reads
        vit.blocks[0].mlp.fc2.weight[:, [3, 77]] = 0.0
        vit.blocks[2].attn.proj.weight[:, [4, 20, 47]] = 0.0
        k = slice(48, 96)
        for tensor in (vit.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.bias):
            tensor[k][[0, 17, 40]] = 0.0
    method, learner = fresh(vit, batches, budget=0.98)
    xi = learner.set_gates(6)
    learner.loss(*batches[0]).backward()
    slopes = xi.grad.clone()
    learner.step(*batches[0], 0.0)
    torch.testing.assert_close(learner.importance, slopes.abs().sum(0))
    learner.decide(method.decisions)
    gone = {s: (~mask).nonzero().flatten() for s, mask in masks_of(learner).items()}
    assert {3, 77} <= set(gone["blocks.0.mlp.neuron"].tolist())
    assert {4, 20, 47} <= set(gone["blocks.2.attn.v_dim"].tolist())
    assert {0, 17, 40} <= set(gone["blocks.1.attn.qk_dim"].tolist())


# Check 4: consistency.


def positions(rows: Tensor, among: Tensor) -> list[int]:
    """Where each row [n, D] stands among others [m, D]."""
    equal = (rows.unsqueeze(1) == among.unsqueeze(0)).all(-1)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1).tolist()


def test_q_and_k_and_v_and_proj_lose_the_same_channels_and_heads_the_same_number(
    tiny, batches
) -> None:
    vit = tiny(**WIDE)
    method, learner = finished(vit, batches)
    learned = learner.conclude(LearningData.of(batches))
    before = learner.vit
    macs = 0.5 * cost_of(vit.shape()).macs
    method.cut_learned(vit, learned, method.allocate(vit.shape(), learned.scores, macs))
    differ = 0
    for old, new in zip(before.blocks, vit.blocks, strict=True):
        attn, heads = new.attn, range(3)
        q_old, k_old, v_old = old.attn.qkv.weight.detach().view(3, 3, 16, 48)
        qk, v = 3 * attn.qk_dim, 3 * attn.v_dim
        q_new, k_new, v_new = attn.qkv.weight.detach().split([qk, qk, v])
        q_new, k_new = q_new.view(3, attn.qk_dim, 48), k_new.view(3, attn.qk_dim, 48)
        v_new = v_new.view(3, attn.v_dim, 48)  # equal numbers in all heads, or there is no view
        of_q = [positions(q_new[h], q_old[h]) for h in heads]
        assert of_q == [positions(k_new[h], k_old[h]) for h in heads]
        of_v = [positions(v_new[h], v_old[h]) for h in heads]
        proj_old = old.attn.proj.weight.detach().t().view(3, 16, 48)
        proj_new = attn.proj.weight.detach().t().view(3, attn.v_dim, 48)
        assert of_v == [positions(proj_new[h], proj_old[h]) for h in heads]
        fc1 = positions(new.mlp.fc1.weight.detach(), old.mlp.fc1.weight.detach())
        assert fc1 == positions(new.mlp.fc2.weight.detach().t(), old.mlp.fc2.weight.detach().t())
        differ += of_q[0] != of_q[1]
        differ += of_v[0] != of_v[1]
        assert attn.qk_dim >= 8
        assert attn.v_dim >= 8
    assert differ > 0
    assert any(block.qk_dim < 16 for block in vit.shape().blocks)
    assert any(block.v_dim < 16 for block in vit.shape().blocks)


def test_slices_take_the_weakest_of_every_head() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [0.5, 9.0, 0.25]])
    assert slice_scores(scores).tolist() == [1.25, 3.5, 14.0]
    assert slice_scores(torch.tensor([2.0, 0.5, 1.0])).tolist() == [0.5, 1.0, 2.0]


# Check 5: masked equals shrunk, with the dense scale.


@pytest.mark.parametrize("frozen", [False, True])
def test_masked_equals_shrunk_and_another_scale_breaks_it(frozen: bool, tiny, batches) -> None:
    vit, images = tiny(**WIDE), images_for(tiny(**WIDE))
    method, learner = fresh(vit, batches)
    with_importance(learner)
    learner.decide(method.decisions)
    if not frozen:  # the same masks, straight through
        learner.decided.fill_(method.decisions - 1)
    learner.set_gates(len(images))
    expected = learner.vit(images).detach()
    assert (expected - vit(images)).abs().max() > 1e-2
    learner.decided.fill_(method.decisions)
    learned = learner.conclude(LearningData.of(batches))
    shares = method.allocate(vit.shape(), learned.scores, 0.5 * cost_of(vit.shape()).macs)
    method.cut_learned(vit, learned, shares)
    assert all(8 <= block.qk_dim < 16 for block in vit.shape().blocks)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-5)
    for block in vit.blocks:
        assert block.attn.scale == 16**-0.5
        block.attn.scale = block.attn.qk_dim**-0.5
    assert (vit(images) - expected).abs().max() > 1e-3


# Check 6: dynamics.


def test_a_masked_channel_comes_back_when_its_score_is_raised(tiny, batches) -> None:
    _, learner = fresh(tiny(**WIDE), batches)
    with_importance(learner)
    learner.decide(10)
    places = (~learner.unmasked).nonzero().flatten()[::20]
    assert len(places) > 5
    learner.importance[places] = 2.0
    learner.decide(11)
    assert learner.unmasked[places].all()
    assert int(learner.returned) >= len(places)
    assert int((~learner.unmasked).sum()) > 0
    assert not learner.frozen


def test_weights_of_masked_channels_change_between_decisions(tiny, batches) -> None:
    method, learner = fresh(tiny(**WIDE), batches, lr=1e-3)
    learner.step(*batches[0], 0.0)
    learner.step(*batches[0], 0.5)  # the masks are decided
    masks = learner.unmasked.clone()
    decided = int(learner.decided)
    assert 0 < decided < method.decisions

    def rows():
        q = learner.vit.blocks[0].attn.qkv.weight[:48]
        fc1 = learner.vit.blocks[0].mlp.fc1.weight
        qk_mask, _, mlp_mask = list(masks_of(learner).values())[:3]
        return torch.cat([q[~qk_mask], fc1[~mlp_mask]]).detach().clone()

    before = rows()
    learner.step(*batches[1], 0.505)
    assert torch.equal(learner.unmasked, masks)
    assert int(learner.decided) == decided
    moved = (rows() - before).abs().amax(1)
    assert len(moved) > 20
    # More than decay alone: 0.05 * lr of weights of about 0.3.
    assert (moved > 1e-4).all()


def test_masks_change_in_a_run_and_stand_at_its_end(tiny, batches) -> None:
    vit = tiny(**WIDE)
    _, learner = fresh(vit, batches, epochs=10, lr=1e-3)
    decisions, removed, steps = [], [], learner.step

    def watched(images, labels, progress):
        loss = steps(images, labels, progress)
        decisions.append(learner.unmasked.clone())
        removed.append(1.0 - learner.report()["remaining_macs"])
        return loss

    learner.step = watched
    run(learner, LearningData.of(batches), 10, seed=0)
    # A slice is half a percent of this model, and plans may differ by that.
    assert all(later > earlier - 0.006 for earlier, later in itertools.pairwise(removed))
    assert removed[0] == 0.0
    for step, share in enumerate(removed):
        wanted = removed_share(int(min(1.0, step / 30 / 0.65) * 20) / 20, 0.5)
        assert wanted <= share + 1e-9 <= wanted + 0.01
    back = sum(int((b & ~a).sum()) for a, b in itertools.pairwise(decisions))
    assert back == int(learner.returned) > 0
    last = [torch.equal(mask, decisions[-1]) for mask in decisions]
    assert last == [step / 30 >= 0.65 for step in range(30)]


# Check 7: the budget.


@pytest.mark.parametrize("budget", [0.45, 0.5, 0.8])
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_plan_costs_what_was_asked_and_respects_the_floors(budget, multiple) -> None:
    shape = deit_tiny_shape()
    method = load_method("cait_channels", multiple=multiple)
    dense = cost_of(shape).macs
    assert section_3_macs(shape) == dense
    for seed in range(2):
        scores = random_scores(method, shape, seed)
        left = method.shrink(shape, method.allocate(shape, scores, budget * dense))
        reached = section_3_macs(left)
        assert reached == cost_of(left).macs
        assert 0.99 * budget * dense <= reached <= budget * dense
        for block in left.blocks:
            assert block.heads == 3
            assert min(block.qk_dim, block.v_dim) >= 8
            assert block.hidden >= 192
            assert block.qk_dim % multiple == block.v_dim % multiple == block.hidden % multiple == 0


def test_floors_hold_where_nothing_is_worth_anything(tiny) -> None:
    shape = deit_tiny_shape()
    method = load_method("cait_channels", least_dims=10, least_neurons=0.3, multiple=8)
    scores = {s: torch.ones_like(v) for s, v in random_scores(method, shape).items()}
    for i in range(4):
        scores[f"blocks.{i}.mlp.neuron"] *= 1e-6
        scores[f"blocks.{i}.attn.qk_dim"] *= 1e-6
    left = method.shrink(shape, method.allocate(shape, scores, 0.75 * cost_of(shape).macs))
    assert {block.hidden for block in left.blocks[:4]} == {232}  # 0.3 * 768 = 230.4, rounded up
    assert {block.qk_dim for block in left.blocks[:4]} == {16}
    narrow = tiny().shape()  # 8 dims per head
    shares = method.allocate(narrow, random_scores(method, narrow), 0.8 * cost_of(narrow).macs)
    assert all(shares[site] == 0.0 for site in shares if site.endswith("dim"))


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_a_run_ends_at_its_budget_and_the_allocation_chooses_its_masks_again(
    budget, tiny, batches
) -> None:
    vit = tiny(**WIDE)
    shape = vit.shape()
    method, learner = finished(vit, batches, budget=budget)
    assert learner.frozen
    learned = learner.conclude(LearningData.of(batches))
    assert budget - 0.01 <= learned.report["remaining_macs"] <= budget
    macs = budget * cost_of(shape).effective_macs
    masks = method.kept(shape, learned.scores, method.allocate(shape, learned.scores, macs))
    for site, mask in masks.items():
        assert torch.equal(mask.flatten(), masks_of(learner)[site])
    by_kind = {kind: [m for s, m in masks.items() if kind_of(s) == kind] for kind in method.units}
    assert all(not all(mask.all() for mask in of) for of in by_kind.values())


def test_a_budget_below_the_floors_is_reported_and_refused_by_the_allocation(tiny, batches) -> None:
    vit = tiny()  # 8 dims per head: only neurons can go
    method, learner = finished(vit, batches, budget=0.3)
    learned = learner.conclude(LearningData.of(batches))
    dense = cost_of(vit.shape()).macs
    assert learned.report["remaining_macs"] == method.least_macs(vit.shape()) / dense > 0.3
    with pytest.raises(ValueError, match="out of reach"):
        method.allocate(vit.shape(), learned.scores, 0.3 * dense)


def test_the_budget_falls_along_a_cubic() -> None:
    assert removed_share(0.0, 0.6) == 0.0
    assert removed_share(1.0, 0.6) == 0.6
    assert removed_share(0.5, 0.6) == pytest.approx(0.6 * 7 / 8)
    slopes = [removed_share(t + 0.01, 1.0) - removed_share(t, 1.0) for t in (0.0, 0.4, 0.98)]
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[-1] < 1e-4


# The run.


def test_the_loss_is_cross_entropy_and_half_the_divergence_from_a_frozen_teacher(
    tiny, batches
) -> None:
    vit = tiny(drop_path_rate=0.2, proj_drop_rate=0.1)
    images, labels = batches[0]
    _, learner = fresh(vit, batches, lr=1e-2)
    learner.train()
    learner.step(images, labels, 0.3)
    assert learner.vit.training
    assert not learner.teacher.training
    assert torch.equal(learner.teacher(images), vit(images))
    assert all(parameter.grad is None for parameter in learner.teacher.parameters())
    learner.eval()
    expected = losses(learner.vit, vit, images, labels).mean()
    learner.set_gates(len(images))
    torch.testing.assert_close(learner.loss(images, labels), expected)
    _, alone = fresh(vit, batches, distill=0.0)
    assert alone.teacher is None
    torch.testing.assert_close(
        alone.loss(images, labels), nn.functional.cross_entropy(vit(images), labels)
    )


def test_the_same_seed_gives_the_same_run_and_it_can_be_interrupted(
    tiny, batches, tmp_path
) -> None:
    vit = tiny(**WIDE, proj_drop_rate=0.1)
    method = load_method("cait_channels", epochs=5, seed=3)
    data, file = LearningData.of(batches), tmp_path / "learning.pt"
    whole, again = method.learn(vit, data), method.learn(vit, data)
    other = dataclasses.replace(method, seed=4).learn(vit, data)
    for stop in (2, 4):  # while the budget falls, and after the masks stand

        def train(epoch: int, stop: int = stop):
            if epoch == stop:
                raise StoppedError
            return batches

        with pytest.raises(StoppedError):
            method.learn(vit, dataclasses.replace(data, train=train), file)
    resumed = method.learn(vit, data, file)
    for same in (again, resumed):
        assert all(torch.equal(same.scores[s], whole.scores[s]) for s in whole.scores)
        assert all(torch.equal(same.weights[n], whole.weights[n]) for n in whole.weights)
        assert same.report["returned"] == whole.report["returned"]
    assert any(not torch.equal(other.scores[s], whole.scores[s]) for s in whole.scores)


def test_a_run_of_one_step_still_decides(tiny, batches) -> None:
    vit = tiny(**WIDE)
    learned = load_method("cait_channels", epochs=1).learn(vit, LearningData.of(batches[:1]))
    assert 0.49 <= learned.report["remaining_macs"] <= 0.5


def test_nothing_is_left_in_the_model(tiny, batches) -> None:
    vit = tiny(**WIDE)
    _, learner = finished(vit, batches)
    learned = learner.conclude(LearningData.of(batches))
    assert [type(m) for m in learner.vit.modules()] == [type(m) for m in vit.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.vit.modules())
    assert set(learned.weights) == set(vit.vit.state_dict())
    assert {s: tuple(v.shape) for s, v in learned.scores.items()} == learner.sizes


def test_blocks_may_lack_heads_or_a_branch_and_normalised_q_and_k_stay(tiny, batches) -> None:
    vit = tiny(**WIDE, qk_norm=True)
    keep_heads(vit.blocks[0].attn, torch.tensor([0, 2]))
    remove_attention(vit.blocks[1])
    remove_mlp(vit.blocks[2])
    method, learner = finished(vit, batches, budget=0.7)
    learned = learner.conclude(LearningData.of(batches))
    assert set(learned.scores) == set(method.sites(vit.shape()))
    assert not any(site.endswith("qk_dim") for site in learned.scores)
    assert learned.scores["blocks.0.attn.v_dim"].shape == (2, 16)
    assert 0.68 <= learned.report["remaining_macs"] <= 0.7


def test_where_nothing_can_go_nothing_is_masked(tiny, batches) -> None:
    vit = tiny(qk_norm=True)
    method = load_method("cait_channels", units=("qk_dim",))
    learned = method.learn(vit, LearningData.of(batches))
    assert learned.report["remaining_macs"] == 1.0
    assert not learned.scores


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("budget", 1.0, "0 < budget < 1"),
        ("decisions", 0, "at least 1"),
        ("ramp", 0.0, "from 0.05 to 1"),
        ("ramp", float("nan"), "from 0.05 to 1"),
        ("ema", 1.5, "from 0 to 1"),
        ("distill", -0.5, "at least 0"),
        ("least_dims", 0, "at least 1"),
        ("least_neurons", 1.1, "from 0 to 1"),
        ("units", ("head",), "qk_dim"),
        ("multiple", 0, "at least 1"),
    ],
)
def test_wrong_options_are_refused(option: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} of cait_channels is .*{right}"):
        load_method("cait_channels", **{option: value})
