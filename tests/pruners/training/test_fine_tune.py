from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruners import Plan, PrunableViT, Step, load_method
from pruners.model.tokens import Tokens
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner, TrainingLeftError
from pruners.training.optimisation import (
    NonFiniteLossError,
    autocast_dtype,
    distillation,
    schedule_factor,
)
from pruners.training.recipe import Recipe

PLAIN = Recipe(epochs=2, lr=1e-3, distill=0.0, precision="float32")


def test_masked_weights_stay_zero_and_the_others_move(tiny, batches) -> None:
    vit = tiny()
    magnitude = load_method("magnitude")
    thresholds = dict.fromkeys(magnitude.sites(vit.shape()), 0.6)
    Plan(steps=(Step(pruner=magnitude, thresholds=thresholds),)).apply(vit)
    before = {site: layer.weight.detach().clone() for site, layer in vit.linears()}
    FineTuner(vit, PLAIN, steps_per_epoch=3).train_epoch(batches)
    for site, layer in vit.linears():
        assert (layer.weight[~vit.masks[site]] == 0).all(), site
        assert (layer.weight != before[site])[vit.masks[site]].float().mean() > 0.99, site


def test_training_lowers_the_loss_and_learns_the_labels(tiny, batches) -> None:
    vit = tiny()
    tuner = FineTuner(
        vit, Recipe(epochs=30, lr=3e-3, distill=0.0, precision="float32"), steps_per_epoch=3
    )
    losses = [tuner.train_epoch(batches) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    assert evaluate(vit, batches).top1 > 90.0


def test_a_resumed_run_is_the_same_run(tiny, batches) -> None:
    straight = tiny()
    halfway = copy.deepcopy(straight)
    tuner = FineTuner(straight, PLAIN, steps_per_epoch=3)
    tuner.train_epoch(batches)
    tuner.train_epoch(batches)
    first = FineTuner(halfway, PLAIN, steps_per_epoch=3)
    first.train_epoch(batches)
    resumed = FineTuner(halfway, PLAIN, steps_per_epoch=3)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.train_epoch(batches)
    for ours, theirs in zip(halfway.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("left_after", [1, 2, 3])
def test_an_epoch_that_was_left_goes_on_as_if_it_had_not_been(
    left_after: int, tiny, batches
) -> None:
    recipe = Recipe(epochs=1, lr=1e-3, distill=0.0, precision="float32")
    straight = tiny(drop_path_rate=0.5)  # which draws at random in each step
    taught = [(images, labels, None) for images, labels in batches]
    torch.manual_seed(4)
    expected = FineTuner(copy.deepcopy(straight), recipe, steps_per_epoch=3)
    loss = expected.train_taught(taught)

    torch.manual_seed(4)
    first = FineTuner(straight, recipe, steps_per_epoch=3)
    with pytest.raises(TrainingLeftError, match=f"left after {left_after} steps"):
        first.train_taught(taught, lambda: first.steps == left_after)
    state = copy.deepcopy(first.state_dict())
    torch.manual_seed(5)  # another process
    second = FineTuner(copy.deepcopy(straight), recipe, steps_per_epoch=3)
    second.load_state_dict(state)
    assert second.train_taught(taught[left_after:]) == loss
    assert second.steps == 0
    for ours, theirs in zip(second.vit.parameters(), expected.vit.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("parts", "sizes"), [(2, {3, 2}), (3, {2, 1}), (5, {1}), (100, {1})])
def test_a_batch_in_parts_is_the_same_step(
    parts: int, sizes: set[int], tiny, batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    five = [(images[:5], labels[:5]) for images, labels in batches]
    whole, split = tiny(), tiny()
    seen: set[int] = set()
    tokens = split.tokens

    def counted(images: torch.Tensor) -> Tokens:
        seen.add(len(images))
        return tokens(images)

    monkeypatch.setattr(split, "tokens", counted)
    losses = []
    for vit, number in ((whole, 1), (split, parts)):
        tuner = FineTuner(vit, PLAIN, steps_per_epoch=3)
        tuner.optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)  # Adam would hide a scale
        tuner.schedule = torch.optim.lr_scheduler.ConstantLR(tuner.optimizer, 1.0)
        tuner.parts = number
        losses.append(tuner.train_epoch(five))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert seen == sizes
    for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_step_without_extras_is_adamw(tiny, batches) -> None:
    vit = tiny()
    reference = copy.deepcopy(vit)
    recipe = Recipe(
        epochs=1, lr=1e-3, weight_decay=0.1, warmup=0.0, clip=1e9, distill=0.0, precision="float32"
    )
    FineTuner(vit, recipe, steps_per_epoch=1).train_epoch(batches[:1])
    decay = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3
    )
    reference.use_fused_attention(False)
    F.cross_entropy(reference(batches[0][0]), batches[0][1]).backward()
    adamw.step()
    for ours, theirs in zip(vit.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_gradients_are_clipped(tiny, batches) -> None:
    vit = tiny()
    FineTuner(vit, Recipe(epochs=1, clip=0.01, distill=0.0, precision="float32"), 3).train_epoch(
        batches[:1]
    )
    norm = torch.stack([p.grad.norm() for p in vit.parameters()]).norm()
    assert norm <= 0.01 * 1.001


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    logits = torch.randn(4, 5, dtype=torch.double)
    targets = torch.randn(4, 5, dtype=torch.double)
    p, q = (targets / 3.0).softmax(1), (logits / 3.0).softmax(1)
    expected = 9.0 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(logits, targets, 3.0), expected)
    assert distillation(targets, targets, 3.0).abs() < 1e-12


def test_pure_distillation_ignores_the_labels(tiny, batches) -> None:
    teacher = tiny()
    recipe = Recipe(epochs=1, distill=1.0, precision="float32")
    students = []
    for shift in (0, 1):
        student = tiny()
        data = [(images, (labels + shift) % 5) for images, labels in batches]
        FineTuner(student, recipe, 3, teacher).train_epoch(data)
        students.append(student)
    for first, second in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(first, second)


DISTILLING = Recipe(epochs=2, lr=1e-3, distill=0.7, temperature=2.0, precision="float32")


class Silent(nn.Module):
    """A teacher that must not be asked."""

    def tokens(self, images: torch.Tensor) -> None:
        raise AssertionError("asked")


def with_answers(teacher: PrunableViT, batches) -> list[tuple[torch.Tensor, ...]]:
    with torch.no_grad():
        return [(images, labels, teacher(images)) for images, labels in batches]


def other_weights(vit: PrunableViT) -> PrunableViT:
    """A student that has something to learn from the dense model."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(0.9)
    return vit


def test_answers_that_come_with_the_batches_train_as_the_teacher_does(tiny, batches) -> None:
    teacher, asked, answered = tiny(), other_weights(tiny()), other_weights(tiny())
    teacher.use_fused_attention(False)
    live = FineTuner(asked, DISTILLING, 3, teacher)
    known = FineTuner(answered, DISTILLING, 3)
    taught = with_answers(teacher, batches)
    plain = FineTuner(other_weights(tiny()), PLAIN, 3).train_epoch(batches)
    first = live.train_epoch(batches)
    assert first == known.train_taught(taught) != plain
    assert live.train_epoch(batches) == known.train_taught(taught)
    for ours, theirs in zip(answered.parameters(), asked.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_teacher_is_asked_only_for_batches_without_answers(tiny, batches) -> None:
    teacher = tiny()
    taught = with_answers(teacher, batches)
    FineTuner(tiny(), DISTILLING, 3, Silent()).train_taught(taught)
    unanswered = [(images, labels, None) for images, labels, _ in taught]
    with pytest.raises(AssertionError, match="asked"):
        FineTuner(tiny(), DISTILLING, 3, Silent()).train_taught([taught[0], *unanswered])
    mixed, live = tiny(), tiny()
    teacher.use_fused_attention(False)
    mixed_loss = FineTuner(mixed, DISTILLING, 3, teacher).train_taught([taught[0], *unanswered[1:]])
    live_loss = FineTuner(live, DISTILLING, 3, teacher).train_epoch(batches)
    assert mixed_loss == pytest.approx(live_loss, rel=1e-5)


def test_a_loss_on_tokens_asks_the_teacher_whatever_the_answers(tiny, batches) -> None:
    teacher, vit = tiny(), tiny()
    seen = []

    def token_loss(tokens: Tokens, taught: Tokens | None) -> torch.Tensor:
        seen.append((tokens, taught))
        return tokens.x.new_zeros(())

    vit.token_loss = token_loss
    taught = with_answers(teacher, batches)
    FineTuner(vit, DISTILLING, 3, teacher).train_taught(taught)
    for (_, given), (images, _) in zip(seen, batches, strict=True):
        torch.testing.assert_close(given.x, teacher.tokens(images).x)
    with pytest.raises(ValueError, match="no teacher to ask for tokens, which token_loss compares"):
        FineTuner(vit, DISTILLING, 3).train_taught(taught)


def test_answers_do_not_matter_without_distillation(tiny, batches) -> None:
    plain, taught = tiny(), tiny()
    FineTuner(plain, PLAIN, 3).train_epoch(batches)
    FineTuner(taught, PLAIN, 3, Silent()).train_taught(with_answers(tiny(), batches))
    for ours, theirs in zip(taught.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_distilling_without_a_teacher_is_refused(tiny, batches) -> None:
    with pytest.raises(ValueError, match=r"distill is 0.5 but there is no teacher .* logits; give"):
        FineTuner(tiny(), Recipe(distill=0.5), 3).train_epoch(batches)


def test_a_loss_that_is_not_finite_stops_by_name(tiny, batches) -> None:
    vit = tiny()
    with torch.no_grad():
        vit.vit.head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="loss is nan within the first 3 steps"):
        FineTuner(vit, PLAIN, 3).train_epoch(batches)


def test_an_epoch_without_batches_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no batches"):
        FineTuner(tiny(), PLAIN, 3).train_epoch([])


def test_schedule() -> None:
    factors = [schedule_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[55] == pytest.approx(0.01 + 0.99 / 2)
    assert 0.01 <= factors[-1] < 0.012


@pytest.mark.parametrize(
    ("features", "dtype"),
    [({}, None), ({"avx512_bf16": True}, None), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_precision(
    features: dict[str, bool], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX512-BF16 alone was measured: half as slow again as float32."""
    cpu = torch.device("cpu")
    assert autocast_dtype("float32", cpu) is None
    assert autocast_dtype("bfloat16", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert autocast_dtype("auto", cpu) is dtype
