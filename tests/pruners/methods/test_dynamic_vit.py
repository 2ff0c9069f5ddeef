from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pruners import PrunableViT, cost_of, load_method
from pruners.methods.dynamic_vit import Predictor
from pruners.model import attention
from pruners.model.tokens import Tokens
from tests.models import VARIANTS, images_for

LARGE = {"img_size": (48, 32), "depth": 4}  # 24 patches, 6 rows of 4
TWO = {"blocks.1.token": 0.4, "blocks.3.token": 0.35}
THREE = {"blocks.1.token": 0.3, "blocks.2.token": 0.25, "blocks.3.token": 0.4}


class Decided(Predictor):
    """A prediction module whose scores are so far apart that no noise changes the decision."""

    def __init__(self, shape, before: Tensor, keep: Tensor) -> None:
        """Keep the patches `keep`, [B, N], of those that arrive, `before`."""
        arriving, kept = int(before[0].sum()), int(keep[0].sum())
        super().__init__(
            shape.dim, prefix_tokens=shape.prefix_tokens, arriving=arriving, kept=max(1, kept)
        )
        self.keep, self.before = keep, before

    def log_probabilities(self, patches: Tensor, kept: Tensor) -> Tensor:
        keep = self.keep
        if patches.shape[1] < keep.shape[1]:  # earlier modules removed patches, in this order
            keep = keep[self.before].view(len(keep), -1)
        # The slope makes patches leave in the order in which they arrive.
        odds = torch.where(keep, 1e4, -1e4) - torch.arange(keep.shape[1])
        return torch.stack([odds, -odds], dim=-1) + 0.0 * patches.sum()


def decide(vit: PrunableViT, thresholds: dict[str, float], images: int) -> list[Tensor]:
    """Cut with modules that keep random patches, image by image; return the masks [B, N]."""
    shape, method = vit.shape(), load_method("dynamic_vit", blocks=[1, 2, 3])
    method.cut(vit, {}, thresholds)
    counts = method.counts(shape, thresholds)
    ranks = torch.rand(images, shape.patches).argsort(dim=1).argsort(dim=1)
    masks = [ranks < count for count in (shape.patches, *counts.values())]
    for block, (before, keep) in zip(counts, pairwise(masks), strict=True):
        vit.blocks[block].front = Decided(shape, before, keep)
    return masks[1:]


def masked_and_gathered(vit: PrunableViT, thresholds: dict[str, float]) -> list[tuple[Tensor, ...]]:
    """Pairs of (masked, gathered): logits, prefix tokens and kept patches."""
    images, prefix = images_for(vit), vit.vit.num_prefix_tokens
    kept = decide(vit, thresholds, len(images))[-1]
    with torch.no_grad():
        masked, gathered = vit.train().tokens(images), vit.eval().tokens(images)
    body = masked.x[:, prefix:][kept].unflatten(0, (len(images), -1))
    return [
        (vit.classify(masked), vit.classify(gathered)),
        (masked.x[:, :prefix], gathered.x[:, :prefix]),
        (body, gathered.x[:, prefix:]),
    ]


@pytest.mark.parametrize("thresholds", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masking_equals_removing(variant: str, thresholds, tiny, monkeypatch) -> None:
    monkeypatch.setattr(attention, "POLICY_EPS", 0.0)
    for masked, gathered in masked_and_gathered(tiny(**LARGE | VARIANTS[variant]), thresholds):
        assert (masked - gathered).abs().max() < 1e-5 if masked.numel() else gathered.numel() == 0


def test_masking_equals_removing_behind_cut_units(tiny, monkeypatch) -> None:
    monkeypatch.setattr(attention, "POLICY_EPS", 0.0)
    vit = tiny(**LARGE)
    units = {"blocks.1.attn.head": 0.4, "blocks.2.attn.head": 1.0, "blocks.3.mlp.neuron": 0.5}
    load_method("grouped", criterion="magnitude", compensate=False).prune(vit, [], units)
    for masked, gathered in masked_and_gathered(vit, THREE):
        torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-5)


def test_the_softmax_epsilon_makes_only_a_small_difference(tiny) -> None:
    for (masked, gathered), bound in zip(
        masked_and_gathered(tiny(**LARGE), THREE), (1e-5, 1e-5, 2e-4), strict=True
    ):
        torch.testing.assert_close(masked, gathered, rtol=0, atol=bound)


def test_zeroed_tokens_are_not_removed_tokens(tiny) -> None:
    vit = tiny(**LARGE)
    images = images_for(vit)
    masks = decide(vit, THREE, len(images))
    with torch.no_grad():
        gathered, x = vit(images), vit.embed(images)
        for block, keep in zip(vit.blocks, [torch.ones_like(masks[0]), *masks], strict=True):
            block.front = None
            x = block(Tokens(x * F.pad(keep, (1, 0), value=True).unsqueeze(-1))).x
        zeroed = vit.classify(Tokens(vit.vit.norm(x)))
    assert (zeroed - gathered).abs().max() > 1e-3


def predictor(dim: int = 24, arriving: int = 24, kept: int = 12, spread: float = 0.3) -> Predictor:
    """A module whose weights are large enough that its scores differ."""
    module = Predictor(dim, prefix_tokens=1, arriving=arriving, kept=kept)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn(parameter.shape))
    return module


def test_scores_of_survivors_do_not_depend_on_dropped_patches() -> None:
    module, x = predictor(), torch.randn(3, 24, 24)
    keep = torch.rand(3, 24).argsort(dim=1) < 10
    whole = module.log_probabilities(x, keep.float())[keep].view(3, 10, 2)
    alone = module.log_probabilities(x[keep].view(3, 10, 24), torch.ones(3, 10))
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    unmasked = module.log_probabilities(x, torch.ones(3, 24))[keep].view(3, 10, 2)
    assert (whole - unmasked).abs().max() > 1e-3


def test_scores_are_those_of_the_paper_written_out() -> None:
    module, x = predictor(dim=8), torch.randn(2, 5, 8)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0]])
    (norm, first, _), (second, _, third, _, last, _) = module.embed, module.judge
    z = F.gelu(first(F.layer_norm(x, (8,), norm.weight, norm.bias)))
    for image in range(2):
        chosen = [i for i in range(5) if kept[image, i]]
        mean = sum(z[image, i, 4:] for i in chosen) / len(chosen)
        for i in range(5):
            u = torch.cat([z[image, i, :4], mean])
            expected = last(F.gelu(third(F.gelu(second(u))))).log_softmax(-1)
            got = module.log_probabilities(x, kept)[image, i]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_policy_has_a_gradient_where_it_is_zero(tiny) -> None:
    vit = tiny(**LARGE)
    x, policy = vit.embed(images_for(vit)), torch.ones(3, 25)
    policy[:, 5:12] = 0.0
    tokens = vit.blocks[1](Tokens(x, policy=policy.requires_grad_(True)))
    F.cross_entropy(vit.classify(vit.blocks[2](tokens)), torch.tensor([0, 3, 1])).backward()
    assert (policy.grad[:, 5:12] != 0.0).all()
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_class_loss_alone_reaches_every_parameter_of_every_module(variant: str, tiny) -> None:
    vit = tiny(**LARGE | VARIANTS[variant])
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    F.cross_entropy(vit.train()(images_for(vit)), torch.tensor([0, 3, 1])).backward()
    for block in vit.blocks[1:]:
        for name, parameter in block.front.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0.0, name


@pytest.mark.parametrize("registers", [0, 2])
def test_what_is_dropped_never_returns_and_the_prefix_always_stays(registers: int, tiny) -> None:
    vit = tiny(**LARGE, reg_tokens=registers)
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    tokens = vit.train().tokens(images_for(vit, 40))
    first, second, third = tokens.decisions
    for decision in tokens.decisions:
        assert decision.unique().tolist() == [0.0, 1.0]
    assert (second <= first).all()
    assert (third <= second).all()
    assert (tokens.policy[:, : 1 + registers] == 1.0).all()
    assert torch.equal(tokens.policy[:, 1 + registers :], third)
    assert not torch.equal(vit.tokens(images_for(vit, 40)).decisions[0], first)


def test_modules_start_at_what_they_are_to_keep(tiny) -> None:
    module = Predictor(96, prefix_tokens=1, arriving=24, kept=16)
    for layer in (module.embed[1], module.judge[0]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0.0).all()
    vit = tiny(**LARGE)
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    decisions = vit.train().tokens(images_for(vit, 500)).decisions
    shares = torch.stack(decisions).mean(dim=(1, 2)).tolist()
    assert shares == pytest.approx([16 / 24, 12 / 24, 7 / 24], abs=0.02)
    assert vit.token_loss.targets == (16 / 24, 12 / 24, 7 / 24)


@pytest.mark.parametrize(
    ("name", "published", "parameters"),
    [
        ("deit_tiny_patch16_224", (1.25, 1.09, 0.93, 0.80, 0.69, 0.60), 60_722),
        ("deit_small_patch16_224", (4.60, 4.04, 3.46, 2.98, 2.57, 2.23), 241_250),
        ("deit_base_patch16_224", (17.56, 15.51, 13.32, 11.48, 9.87, 8.56), 961_730),
    ],
)
def test_published_costs(name: str, published: tuple[float, ...], parameters: int) -> None:
    with torch.device("meta"):
        shape = PrunableViT.from_timm(name, pretrained=False).shape()
    method = load_method("dynamic_vit")
    for rate, gmacs in zip((1.0, 0.9, 0.8, 0.7, 0.6, 0.5), published, strict=True):
        shrunk = method.shrink(shape, dict.fromkeys(method.sites(shape), 1.0 - rate))
        assert cost_of(shrunk).gmacs == pytest.approx(gmacs, rel=0.01)
        if rate == 0.7:
            assert [b.tokens for b in shrunk.blocks] == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3
            assert [b.reducer_params for b in shrunk.blocks if b.reducer_params] == [parameters] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flop_counter_agrees(variant: str, tiny) -> None:
    vit = tiny(**LARGE | VARIANTS[variant])
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    vit.use_fused_attention(False)  # the counter misses the fused kernel on CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, count=1))
    assert cost_of(vit.shape()).macs == counter.get_total_flops() / 2
    assert cost_of(vit.shape()).params == sum(p.numel() for p in vit.parameters())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shares=st.lists(st.floats(0.0, 0.999), min_size=3, max_size=3))
def test_any_shares_give_the_predicted_shape(shares: list[float], tiny) -> None:
    vit = tiny(**LARGE)
    method = load_method("dynamic_vit", blocks=[3, 1, 2])
    thresholds = {f"blocks.{i}.token": share for i, share in enumerate(shares, start=1)}
    predicted = method.shrink(vit.shape(), thresholds)
    method.cut(vit, {}, thresholds)
    assert vit.shape() == predicted
    tokens = Tokens(vit.embed(images_for(vit)))
    for block, expected in zip(vit.blocks, predicted.blocks, strict=True):
        tokens = block(tokens)
        assert tokens.x.shape[1] == expected.tokens == expected.mlp_tokens
    left = 1.0
    for share, block in zip(shares, predicted.blocks[1:], strict=True):
        left *= 1.0 - share
        assert block.tokens == 1 + max(1, math.floor(24 * left + 1e-9))


def test_evaluation_draws_nothing(tiny) -> None:
    vit = tiny(**LARGE)
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    for block in vit.blocks[1:]:
        block.front.load_state_dict(predictor().state_dict())  # no scores that nearly tie
    images = images_for(vit, 7)
    with torch.no_grad():
        first = vit(images)
        torch.rand(1)
        assert torch.equal(vit(images), first)
        for count in (1, 4):
            torch.testing.assert_close(vit(images[:count]), first[:count], rtol=0, atol=1e-5)
        scores = vit.train().tokens(images).decisions
        assert len(scores) == 3
        assert not torch.equal(vit(images), first)


def test_patches_leave_by_score_best_first() -> None:
    module, x = predictor(kept=5).eval(), torch.randn(2, 1 + 24, 24)
    keep = module.log_probabilities(x[:, 1:], torch.ones(2, 24))[..., 0]
    best = 1 + keep.argsort(dim=1, descending=True)[:, :5]
    left = module(Tokens(x)).x
    for image in range(2):
        assert torch.equal(left[image], x[image, [0, *best[image].tolist()]])


@pytest.mark.parametrize("registers", [0, 2])
def test_dropping_everything_stays_finite(registers: int, tiny) -> None:
    vit = tiny(**LARGE, reg_tokens=registers)
    load_method("dynamic_vit", blocks=[1, 2, 3]).cut(vit, {}, THREE)
    with torch.no_grad():
        vit.blocks[1].front.judge[4].bias.copy_(torch.tensor([-40.0, 40.0]))
    tokens = vit.train().tokens(images_for(vit))
    assert all((decision == 0.0).all() for decision in tokens.decisions)
    (vit.classify(tokens).square().sum() + vit.aux_loss(tokens, tokens)).backward()
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name


def test_a_width_that_cannot_be_halved_twice_is_refused(tiny) -> None:
    vit = tiny(embed_dim=30)
    method = load_method("dynamic_vit")
    with pytest.raises(ValueError, match=r"width of the model is 30; .* a multiple of 4"):
        method.shrink(vit.shape(), {"blocks.1.token": 0.5})
    assert method.shrink(vit.shape(), {"blocks.1.token": 0.0}) == vit.shape()
