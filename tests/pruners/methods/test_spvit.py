from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pruners.model.attention
from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.methods.spvit import Selector
from pruners.model.policy import PolicyLoss, ratio_loss
from pruners.model.soft_tokens import package
from pruners.model.tokens import Tokens, split_by_score, take_tokens
from tests.models import VARIANTS, images_for

TWO_STAGES = {"blocks.1.token": 0.3, "blocks.2.token": 0.5}


def with_two_stages(vit: PrunableViT, **options: object) -> PrunableViT:
    """Selectors in front of blocks 1 and 2, their parameters random."""
    load_method("spvit", **options).cut(vit, {}, TWO_STAGES)
    for block in vit.blocks:
        if block.front is not None:
            randomise(block.front)
    return vit


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)


def some_decisions(images: int, patches: int, counts: tuple[int, ...]) -> list[Tensor]:
    """[B, patches] of each stage: nested random sets, others in every image."""
    order = torch.rand(images, patches).argsort(dim=1).argsort(dim=1)
    return [(order < count).float() for count in counts]


def masked_forward(
    vit: PrunableViT, images: Tensor, decisions: list[Tensor], stage=Selector.mask
) -> Tokens:
    """The forward pass of training, with given decisions."""
    tokens, stages = Tokens(vit.embed(images)), iter(decisions)
    for block in vit.blocks:
        if (front := block.front) is not None:
            decision = next(stages)
            keep = front.score(tokens).keep[:, : decision.shape[1]]
            tokens = stage(front, tokens, keep, decision)
        tokens = run_without_front(block, tokens)
    return tokens._replace(x=vit.vit.norm(tokens.x))


def gathered_forward(vit: PrunableViT, images: Tensor, decisions: list[Tensor]) -> Tokens:
    """The forward pass of inference, with given decisions."""
    tokens, stages = Tokens(vit.embed(images)), iter(decisions)
    left = torch.arange(decisions[0].shape[1]).expand(len(images), -1)  # [B, patches still there]
    for block in vit.blocks:
        if (front := block.front) is not None:
            goes_on = next(stages).gather(1, left)
            kept, dropped = split_by_score(goes_on, int(goes_on[0].sum()))
            keep = front.score(tokens).keep[:, : left.shape[1]]
            tokens = front.gather(tokens, keep, kept, dropped)
            left = left.gather(1, kept)
        tokens = run_without_front(block, tokens)
    return tokens._replace(x=vit.vit.norm(tokens.x))


def run_without_front(block, tokens: Tokens) -> Tokens:
    bare = copy.copy(block)
    bare._modules = {**block._modules, "front": None}
    return bare(tokens)


def masking_equals_gathering(vit: PrunableViT, stage=Selector.mask) -> None:
    shape = vit.shape()
    images, prefix = images_for(vit), shape.prefix_tokens
    decisions = some_decisions(len(images), shape.patches, (shape.patches - 8, 5))
    masked = masked_forward(vit, images, decisions, stage)
    gathered = gathered_forward(vit, images, decisions)
    torch.testing.assert_close(vit.classify(masked), vit.classify(gathered), rtol=0, atol=1e-5)
    keep = decisions[-1].bool()
    for image in range(len(images)):
        x = masked.x[image]
        patches = x[prefix : prefix + shape.patches][keep[image]]
        packages = x[prefix + shape.patches :]
        assert len(packages) == 2
        there = gathered.x[image]
        for ours, theirs in (
            (x[:prefix], there[:prefix]),
            (packages, there[-2:]),
            (patches.sort(dim=0).values, there[prefix:-2].sort(dim=0).values),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# 1: masking and gathering


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalise", [True, False])
def test_masked_training_equals_inference(
    variant: str, normalise: bool, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruners.model.attention, "POLICY_EPS", 0.0)
    vit = tiny(img_size=(48, 32), **VARIANTS[variant])
    with torch.no_grad():
        masking_equals_gathering(with_two_stages(vit, normalise_package=normalise))


def package_of_all_dropped(self: Selector, tokens: Tokens, keep: Tensor, decision: Tensor):
    """A broken stage: its package holds what earlier stages dropped, too."""
    tokens = Selector.mask(self, tokens, keep, decision)
    start = self.prefix_tokens
    patches = tokens.x[:, start : start + keep.shape[1]]
    new = package(patches, keep * (1 - tokens.decisions[-1]), normalise=True)
    return tokens._replace(x=torch.cat([tokens.x[:, :-1], new], dim=1))


def forgotten_policy(self: Selector, tokens: Tokens, keep: Tensor, decision: Tensor):
    """A broken stage: dropped tokens are still seen."""
    tokens = Selector.mask(self, tokens, keep, decision)
    return tokens._replace(policy=torch.ones_like(tokens.policy))


@pytest.mark.parametrize("broken", [package_of_all_dropped, forgotten_policy])
@torch.no_grad()
def test_the_comparison_can_fail(broken, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruners.model.attention, "POLICY_EPS", 0.0)
    vit = with_two_stages(tiny(img_size=(48, 32)))
    with pytest.raises(AssertionError, match="not close"):
        masking_equals_gathering(vit, broken)


def test_the_model_runs_these_stages_itself(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws, inference ranks; given the ranking's decision both are the same."""
    monkeypatch.setattr(pruners.model.attention, "POLICY_EPS", 0.0)
    vit = with_two_stages(tiny(img_size=(48, 32)))
    expected = vit.eval()(images_for(vit))
    counts = iter([16, 8])
    fronts = [block.front for block in vit.blocks if block.front is not None]
    scores: list[Tensor] = []
    for front in fronts:
        monkeypatch.setattr(front, "score", recorded(front.score, scores))
    arrived = torch.ones(3, 24)

    def best(logits: Tensor) -> Tensor:
        nonlocal arrived
        ranked = scores[-1][:, :24].masked_fill(arrived == 0, -1.0)
        kept, _ = split_by_score(ranked, next(counts))
        arrived = torch.zeros_like(arrived).scatter(1, kept, 1.0)
        return arrived

    monkeypatch.setattr("pruners.methods.spvit.draw_keeps", best)
    with torch.no_grad():
        tokens = vit.train().tokens(images_for(vit))
    torch.testing.assert_close(vit.classify(tokens), expected, rtol=0, atol=1e-5)


def recorded(score, scores: list[Tensor]):
    def call(tokens: Tokens):
        result = score(tokens)
        scores.append(result.keep)
        return result

    return call


# 2: the package


def a_stage(vit: PrunableViT) -> tuple[Selector, Tokens, Tensor]:
    """The second selector, the tokens that reach it in training, and keep probabilities."""
    shape = vit.shape()
    front = vit.blocks[2].front
    x = torch.randn(3, 1 + 24 + 1, shape.dim)
    before = some_decisions(3, 24, (16,))[0]
    policy = torch.cat([torch.ones(3, 1), before, torch.ones(3, 1)], dim=1)
    return front, Tokens(x, policy=policy, decisions=(before,)), torch.rand(3, 24)


def drops_at(before: Tensor, count: int) -> Tensor:
    """A decision [B, patches] that drops the first `count` patches still there."""
    return before * (before.cumsum(dim=1) > count)


def test_a_package_is_the_weighted_mean_of_what_is_dropped_now(tiny) -> None:
    front, tokens, keep = a_stage(with_two_stages(tiny(img_size=(48, 32))))
    before = tokens.decisions[0]
    decision = drops_at(before, 5)
    now = (before - decision).bool()
    result = front.mask(tokens, keep, decision)
    for image in range(3):
        x, weight = tokens.x[image, 1:25][now[image]], keep[image][now[image]]
        assert len(x) == 5
        by_hand = sum(w * t for w, t in zip(weight, x, strict=True)) / sum(weight)
        torch.testing.assert_close(result.x[image, -1], by_hand)
    for changed, moves in ((decision.bool(), False), (before == 0, False), (now, True)):
        x = tokens.x.clone()
        x[:, 1:25][changed] += 1.0
        again = front.mask(tokens._replace(x=x), keep, decision)
        assert torch.equal(again.x[:, -1], result.x[:, -1]) != moves


def test_the_sum_of_the_released_script_is_an_option(tiny) -> None:
    front, tokens, keep = a_stage(with_two_stages(tiny(img_size=(48, 32)), normalise_package=False))
    decision = drops_at(tokens.decisions[0], 5)
    weight = keep * (tokens.decisions[0] - decision)
    by_hand = torch.einsum("bn,bnd->bd", weight, tokens.x[:, 1:25])
    torch.testing.assert_close(front.mask(tokens, keep, decision).x[:, -1], by_hand)


def test_packages_of_one_and_of_no_token(tiny) -> None:
    front, tokens, keep = a_stage(with_two_stages(tiny(img_size=(48, 32))))
    before = tokens.decisions[0]
    one = drops_at(before, 1)
    dropped = (before - one).argmax(dim=1, keepdim=True)
    alone = take_tokens(tokens.x[:, 1:25], dropped)
    torch.testing.assert_close(front.mask(tokens, keep, one).x[:, -1:], alone)
    keep = keep.requires_grad_()
    decision = before.clone().requires_grad_()
    nothing = front.mask(tokens, keep, decision)
    assert (nothing.x[:, -1] == 0).all()
    gradient = torch.autograd.grad(nothing.x.square().sum() + nothing.x.sum(), decision)[0]
    assert gradient.abs().max() < 100.0


# 4: the ratio


def test_the_ratio_is_of_the_batch(tiny) -> None:
    nine, five = torch.zeros(10), torch.zeros(10)
    nine[:9], five[3:8] = 1.0, 1.0
    decisions = (torch.stack([nine, five]),)
    method = load_method("spvit")
    assert ratio_loss(decisions, (0.7,), per_image=method.per_image) == pytest.approx(0, abs=1e-12)
    assert ratio_loss(decisions, (0.7,), per_image=True) == pytest.approx(0.04)
    loss = method.loss(tiny(img_size=(48, 32)).shape(), TWO_STAGES)
    assert loss == PolicyLoss(
        targets=(16 / 24, 8 / 24),
        prefix_tokens=1,
        patches=24,
        ratio_weight=2.0,
        token_weight=0.5,
        per_image=False,
    )


# 5, 6: lengths, masks, determinism


@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_and_monotone_masks(variant: str, tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32), **VARIANTS[variant]))
    prefix, images = vit.shape().prefix_tokens, images_for(vit)
    tokens = vit.train().tokens(images)
    assert tokens.x.shape[1] == prefix + 24 + 2
    first, second = tokens.decisions
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert (second <= first).all()
    assert second.sum() < first.sum() < first.numel()
    assert (tokens.policy[:, :prefix] == 1).all()
    assert torch.equal(tokens.policy[:, prefix:-2], second)
    assert (tokens.policy[:, -2:] == 1).all()
    assert vit.eval().tokens(images).x.shape[1] == prefix + 8 + 2
    assert [block.tokens - prefix for block in vit.shape().blocks] == [24, 16 + 1, 8 + 2]


def test_packages_are_never_dropped_however_low_they_score(tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32)))
    front = vit.blocks[2].front
    x = torch.randn(3, 1 + 16 + 1, 24)
    keep = torch.rand(3, 16)
    after = front.gather(Tokens(x), keep, *split_by_score(keep, 8))
    assert torch.equal(after.x[:, -2], x[:, -1])
    assert torch.equal(after.x[:, 0], x[:, 0])
    best = keep.argsort(dim=1, descending=True)
    assert torch.equal(after.x[:, 1:9], take_tokens(x[:, 1:17], best[:, :8]))


def test_evaluation_is_deterministic_and_training_is_not(tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32)))
    images = images_for(vit)
    assert torch.equal(vit(images), vit(images))
    vit.train()
    assert not torch.equal(vit.tokens(images).decisions[0], vit.tokens(images).decisions[0])


# 7: gradients


def test_gradient_through_the_package_alone(tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32))).train()
    tokens = Tokens(vit.embed(images_for(vit)))
    front = vit.blocks[1].front
    tokens = front(run_without_front(vit.blocks[0], tokens))
    tokens = tokens._replace(policy=tokens.policy.detach())  # no gradient through attention
    run_without_front(vit.blocks[1], tokens).x[:, 0].square().sum().backward()
    for name, parameter in front.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_gradient_through_attention_reaches_the_selectors_and_the_backbone(tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32))).train()
    tokens = vit.tokens(images_for(vit))
    (vit.classify(tokens).square().sum() + vit.aux_loss(tokens)).backward()
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            assert torch.isfinite(parameter.grad).all(), name


# cost


def counted_macs(vit: PrunableViT) -> float:
    vit.use_fused_attention(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, count=1))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_cost_is_exact(variant: str, tiny) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32), **VARIANTS[variant]))
    cost = cost_of(vit.shape())
    assert cost.macs == counted_macs(vit)
    assert cost.params == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize(
    ("name", "keeps", "gmacs"),
    [
        ("deit_small_patch16_224", (0.7, 0.49, 0.343), 2.93),
        ("deit_small_patch16_224", (0.617, 0.369, 0.137), 2.46),
        ("deit_tiny_patch16_224", (0.7, 0.49, 0.343), 0.79),
        ("deit_small_distilled_patch16_224", (0.7, 0.49, 0.343), 2.93),
    ],
)
def test_published_macs(name: str, keeps: tuple[float, ...], gmacs: float) -> None:
    shape = PrunableViT.from_timm(name, pretrained=False).shape()
    step = load_method("spvit").placed(dict(zip((3, 6, 9), keeps, strict=True)))
    assert cost_of(step.pruner.shrink(shape, step.thresholds)).gmacs == pytest.approx(
        gmacs, rel=0.01
    )


def test_deit_small_has_41625_parameters_per_stage() -> None:
    shape = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).shape()
    thresholds = dict.fromkeys(("blocks.3.token", "blocks.6.token", "blocks.9.token"), 0.3)
    shrunk = load_method("spvit").shrink(shape, thresholds)
    assert [b.reducer_params for b in shrunk.blocks if b.reducer_params] == [41_625] * 3
    assert sum(b.reducer_macs for b in shrunk.blocks) == pytest.approx(17e6, rel=0.05)


# models of other kinds


def test_a_distilled_deit(tiny) -> None:
    vit = PrunableViT.from_timm(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=64, depth=4
    ).eval()
    load_method("spvit").cut(vit, {}, {"blocks.1.token": 0.5, "blocks.2.token": 0.5})
    images = images_for(vit)
    assert vit(images).shape == (3, 1000)
    assert vit.tokens(images).x.shape[1] == 2 + 4 + 2
    tokens = vit.train().tokens(images)
    assert (tokens.policy[:, :2] == 1).all()


def test_heads_after_unit_pruning(tiny, tmp_path) -> None:
    vit = tiny(img_size=(48, 32))
    units = {"blocks.0.attn.head": 0.6, "blocks.1.attn.head": 0.4, "blocks.2.attn.head": 1.0}
    plan = Plan(
        steps=(
            Step(
                pruner=load_method("grouped", criterion="magnitude", compensate=False),
                thresholds=units,
            ),
            Step(pruner=load_method("spvit"), thresholds=TWO_STAGES),
        )
    )
    plan.apply(vit)
    assert [b.heads for b in vit.shape().blocks] == [1, 2, 0]
    assert vit.blocks[2].front.classifier.heads == 2  # the most heads of any block
    vit.save(tmp_path)
    assert torch.equal(PrunableViT.load(tmp_path).eval()(images_for(vit)), vit(images_for(vit)))


def test_saved_models_open_again(tiny, tmp_path) -> None:
    vit = with_two_stages(tiny(img_size=(48, 32)), normalise_package=False)
    vit.save(tmp_path)
    again = PrunableViT.load(tmp_path).eval()
    assert torch.equal(again(images_for(vit)), vit(images_for(vit)))
    assert again.token_loss == vit.token_loss
    assert not again.blocks[1].front.normalise_package
    assert again.vit.pos_embed.requires_grad is False


def test_dropping_one_patch_for_a_package_is_not_done(tiny) -> None:
    shape = tiny().shape()  # 6 patches
    shrunk = load_method("spvit").shrink(shape, {"blocks.1.token": 0.2})
    assert cost_of(shrunk) != cost_of(shape)  # two are dropped
    assert shrunk.blocks[1].tokens == 1 + 4 + 1
    shrunk = load_method("spvit").shrink(shape, {"blocks.1.token": 0.1})
    assert cost_of(shrunk) == cost_of(shape)


def test_options_are_checked(tiny) -> None:
    with pytest.raises(ValueError, match=r"blocks of spvit is \[3, 3\]"):
        load_method("spvit", blocks=[3, 3])
    with pytest.raises(ValueError, match="token_weight of spvit is -1"):
        load_method("spvit", token_weight=-1.0)
    with pytest.raises(ValueError, match="option 'pack' of spvit is unknown"):
        load_method("spvit", pack=True)
    with pytest.raises(ValueError, match="blocks of spvit has 7; give 1 to 2"):
        load_method("spvit", blocks=[7]).sites(tiny().shape())
