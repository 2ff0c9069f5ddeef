"""What SPViT learns: which patches matter, and where its selectors stand."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pruners import Plan, PrunableViT, Step, load_method
from pruners.latency.phases import Rules, selector_blocks
from pruners.latency.table import LatencyTable
from pruners.methods.spvit import with_selectors
from pruners.model.tokens import Tokens, split_by_score
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.learner import LearningData
from pruners.training.recipe import Recipe
from tests.models import images_for


def marked_images(count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Noise of 4 x 4 patches, one of which shows a class: batches of images, labels and marks."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.eye(3)[:, :, None, None, None] * 3.0  # [classes, channels, 1, 1, 1]
    found = []
    for _ in range(count):
        labels = torch.randint(3, (32,), generator=generator)
        marks = torch.rand(32, 16, generator=generator).argsort(1).argsort(1) < 1
        patches = 0.5 * torch.randn(32, 3, 16, 8, 8, generator=generator)
        patches += colours[labels] * marks[:, None, :, None, None]
        grid = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5)
        found.append((grid.reshape(32, 3, 32, 32), labels, marks))
    return found


@pytest.mark.slow
def test_selectors_learn_to_keep_what_matters(tiny) -> None:
    """In a model that is trained already: else it learns to read the package as well."""
    found = []
    for seed in (1, 2):
        vit = tiny(img_size=(32, 32), num_classes=3)
        batches = marked_images(60, seed)
        pairs = [(images, labels) for images, labels, _ in batches]
        tuner = FineTuner(vit, Recipe(epochs=2, lr=2e-3, distill=0.0), len(pairs))
        for _ in range(2):
            tuner.train_epoch(pairs)
        load_method("spvit").cut(vit, {}, {"blocks.1.token": 0.7})  # 4 of 16 patches go on
        recipe = Recipe(epochs=4, lr=1e-6, selector_lr=1e-2, distill=0.0)
        tuner = FineTuner(vit, recipe, len(pairs))
        for _ in range(recipe.epochs):
            tuner.train_epoch(pairs)
        ((images, labels, marks),) = marked_images(1, seed + 2)
        vit.eval()
        tokens = vit.blocks[0](Tokens(vit.embed(images)))
        kept, _ = split_by_score(vit.blocks[1].front.score(tokens).keep, 4)
        found.append(marks.gather(1, kept).any(1).float().mean())
        assert (vit(images).argmax(1) == labels).float().mean() > 0.9
    assert torch.stack(found).mean() > 0.45, found  # by chance 0.25, deviating by 0.05


def a_table(vit: PrunableViT, selector_s: float) -> LatencyTable:
    shape = vit.shape()
    counts = tuple(range(1, shape.prefix_tokens + shape.patches + 1))
    return LatencyTable(
        counts=counts,
        blocks_s=(tuple(n / counts[-1] for n in counts),),
        kinds=(0,) * len(shape.blocks),
        selector_s=(selector_s,) * len(counts),
        outer_s=0.1,
    )


def learning_data(count: int = 3) -> LearningData:
    return LearningData.of([(images, labels) for images, labels, _ in marked_images(count, 3)])


@pytest.mark.slow
def test_a_real_schedule_meets_its_limit_and_leaves_the_model_as_it_was(tiny) -> None:
    vit = tiny(img_size=(32, 32), num_classes=3, depth=6).train()
    before, shape = copy.deepcopy(vit.state_dict()), vit.shape()
    table = a_table(vit, 0.05)
    limit = 0.6 * table.latency_of(shape)
    found = load_method("spvit").schedule(vit, learning_data(), table, limit, seed=3)
    assert vit.training
    assert vit.shape() == shape
    assert vit.token_step is None
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())
    shrunk = Plan(steps=(found.step,)).shape(shape)
    assert table.latency_of(shrunk) == found.seconds <= limit
    blocks = found.step.pruner.blocks
    assert set(blocks) <= set(selector_blocks(6))
    assert [i for i, b in enumerate(shrunk.blocks) if b.reducer_params] == list(blocks)
    assert found.vit.shape() == shrunk
    assert found.epochs > len(blocks)
    assert evaluate(found.vit, learning_data().val()).top1 == found.top1
    Plan(steps=(found.step,)).apply(vit)
    assert vit.shape() == shrunk
    assert Plan.from_json(Plan(steps=(found.step,)).to_json()) == Plan(steps=(found.step,))


def test_schedules_are_deterministic_and_impossible_ones_are_refused(tiny) -> None:
    vit = tiny(img_size=(32, 32), num_classes=3)
    table, method = a_table(vit, 0.05), load_method("spvit")
    rules = Rules(grid=(1.0, 0.6, 0.3), tolerance=100.0)
    one, two = (
        method.schedule(vit, learning_data(2), table, 2.5, rules=rules, seed=1) for _ in range(2)
    )
    assert one.step == two.step
    assert torch.equal(one.vit(images_for(vit)), two.vit(images_for(vit)))
    with pytest.raises(ValueError, match=r"limit is 0\.5 s"):
        method.schedule(vit, learning_data(2), table, 0.5)


def test_trained_selectors_are_carried_on_at_the_share_they_now_keep(tiny) -> None:
    method = load_method("spvit")
    vit = with_selectors(tiny(img_size=(48, 32)), method.placed({2: 0.5}))
    with torch.no_grad():
        for parameter in vit.blocks[2].front.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    new = with_selectors(vit, method.placed({1: 0.75, 2: 0.5}))
    old, front = vit.blocks[2].front, new.blocks[2].front
    assert (old.packages, front.packages) == (0, 1)
    assert torch.equal(front.classifier.embed.weight, old.classifier.embed.weight)
    x = Tokens(torch.randn(2, 25, 24))
    margins = [
        f.classifier.verdicts(x.x[:, 1:].unflatten(-1, (3, 8)), torch.ones(2, 24))
        @ torch.tensor([1.0, -1])
        for f in (front, old)
    ]
    moved = math.log(2.0) - 0.0  # from 12 of 24 to 12 of 18
    torch.testing.assert_close(margins[0] - margins[1], torch.full((2, 24, 3), moved))
    assert vit.blocks[1].front is None


def test_a_measured_table_covers_every_schedule_of_its_grid(tiny) -> None:
    vit = tiny(img_size=(48, 32), depth=4)
    method = load_method("spvit")
    table = method.latency_table(vit, batch=2, rounds=2)
    assert (table.counts[0], table.counts[-1]) == (1 + 7 + 1, 25)
    for keeps in ({1: 0.9, 2: 0.6, 3: 0.3}, {1: 0.3}, {3: 0.9}, {}):
        step = method.placed(keeps)
        assert table.latency_of(step.pruner.shrink(vit.shape(), step.thresholds)) > 0


def test_placed_gives_the_counts_of_the_keep_ratios(tiny) -> None:
    shape = PrunableViT.from_timm("deit_tiny_patch16_224", pretrained=False).shape()
    step = load_method("spvit").placed({4: 0.9, 7: 0.6, 11: 0.3})
    assert isinstance(step, Step)
    assert step.pruner == dataclasses.replace(load_method("spvit"), blocks=(4, 7, 11))
    assert step.pruner.counts(shape, step.thresholds) == {4: 176, 7: 117, 11: 58}
