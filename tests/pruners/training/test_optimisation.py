from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruners import load_method
from pruners.families.learned import LearnedPruner, UnitLearner
from pruners.training.learner import LearningData, run
from pruners.training.optimisation import (
    autocast,
    backward,
    clip_and_step,
    decayed,
    distillation,
    distilled_loss,
    set_lr,
)
from pruners.training.sealed import load_sealed, save_sealed


def test_matrices_decay_and_vectors_do_not() -> None:
    norm, linear, frozen = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False)
    model = nn.Sequential(norm, linear, frozen)
    matrices, vectors = decayed(model.parameters(), 0.3, lr=0.1)
    assert matrices == {"params": [linear.weight], "weight_decay": 0.3, "lr": 0.1}
    assert vectors["params"] == [norm.weight, norm.bias, linear.bias]
    assert vectors["weight_decay"] == 0.0
    assert vectors["lr"] == 0.1


@pytest.mark.parametrize("name", ["x_pruner", "wdpruning", "uvc", "vit_slim", "cait_channels"])
def test_learning_decays_what_fine_tuning_decays(name: str, tiny, batches) -> None:
    method = load_method(name)
    assert isinstance(method, LearnedPruner)
    learner = method.learner(tiny(), LearningData.of(batches))
    assert isinstance(learner, UnitLearner)
    groups = learner.optimizers["weights"].param_groups
    assert all((p.ndim > 1) == (g["weight_decay"] > 0.0) for g in groups for p in g["params"])
    weights = {id(p) for group in groups for p in group["params"]}
    assert {id(p) for p in learner.vit.parameters()} - {id(g) for g in _gates(learner)} <= weights


def _gates(learner: UnitLearner) -> list[nn.Parameter]:
    own = [o for name, o in learner.optimizers.items() if name != "weights"]
    return [p for o in own for group in o.param_groups for p in group["params"]]


def test_a_state_with_the_groups_of_the_version_before_starts_the_run_again(
    tiny, batches, tmp_path
) -> None:
    method, data, path = load_method("cait_channels"), LearningData.of(batches), tmp_path / "a.part"
    assert isinstance(method, LearnedPruner)
    learner = method.learner(tiny(), data)
    old = torch.optim.AdamW(learner.vit.parameters(), lr=1e-4, weight_decay=0.05)
    state = {
        "done": 1,
        "learner": learner.state_dict(),
        "optimizers": {"weights": old.state_dict()},
    }
    save_sealed(state, path)
    epochs: list[int] = []

    def train(epoch: int):
        epochs.append(epoch)
        return batches

    run(learner, LearningData(train=train, val=data.val, steps=data.steps), 2, 0, path)
    assert epochs == [0, 1]
    assert load_sealed(path, torch.device("cpu"))["done"] == 2


def test_each_set_is_clipped_by_itself_and_old_gradients_do_not_count() -> None:
    large, small = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([large, small], lr=1.0)
    for _ in range(2):  # the second time as the first: gradients do not add up
        backward((large * 30.0).sum() + (small * 0.1).sum(), [optimizer])
    clip_and_step([optimizer], [large], [small], norm=2.0)
    torch.testing.assert_close(large.detach().norm(), torch.tensor(2.0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(small.detach(), torch.full((2,), -0.1))


def test_the_rate_is_that_of_all_groups() -> None:
    optimizer = torch.optim.AdamW(decayed(nn.Linear(2, 2).parameters(), 0.1), lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_loss_is_a_mean_of_labels_and_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 4, 5, generator=generator)
    labels = torch.tensor([0, 3, 3, 1])
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    found = distilled_loss(
        logits, labels, targets, distill=0.3, temperature=2.0, label_smoothing=0.1
    )
    torch.testing.assert_close(found, 0.7 * hard + 0.3 * distillation(logits, targets, 2.0))
    alone = distilled_loss(logits, labels, None, distill=0.3, temperature=2.0, label_smoothing=0.1)
    torch.testing.assert_close(alone, hard)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_forward_pass_computes_in_the_type(dtype: torch.dtype | None) -> None:
    layer = nn.Linear(3, 3)
    with autocast(torch.device("cpu"), dtype):
        assert layer(torch.ones(2, 3)).dtype == (dtype or torch.float32)
