"""Learning runs: what a method trains beside a copy of a model, epoch by epoch, resumably."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pruners.model.files import replace_file
from pruners.model.types import Batches
from pruners.model.vit import ViT
from pruners.training.optimisation import NonFiniteLossError, Precision, autocast_dtype
from pruners.training.sealed import load_sealed, save_sealed


@dataclass(frozen=True, kw_only=True)
class LearningData:
    """Images to learn on.

    Attributes:
        train: Epoch 0, 1, ... -> its training batches.
        val: -> batches on which choices are made, never trained on.
        steps: Training batches of an epoch.
    """

    train: Callable[[int], Batches]
    val: Callable[[], Batches]
    steps: int

    @classmethod
    def of(cls, batches: Batches) -> LearningData:
        """Train on the same batches in every epoch, and choose on them too."""
        return cls(train=lambda epoch: batches, val=lambda: batches, steps=sum(1 for _ in batches))


class Learner(nn.Module, abc.ABC):
    """A learning run in progress: a model, what is learned beside it, and their optimisers.

    Parameters and buffers of this module and the optimisers' state are all that a resumed run
    needs.

    Attributes:
        vit: The model, a copy that the run may change.
        teacher: The model as it was, frozen and in eval mode; None without distillation.
        optimizers: By name.
        device: The model's.
        autocast: The type that training computes in (`autocast_dtype`), None for float32.
    """

    teacher: ViT | None

    def __init__(self, vit: ViT, *, distils: bool = False, precision: Precision = "auto") -> None:
        """Take over a copy of a model, without gates."""
        super().__init__()
        self.device = next(vit.parameters()).device
        self.autocast = autocast_dtype(precision, self.device)
        self.vit = vit
        self.teacher = copy.deepcopy(vit).requires_grad_(False) if distils else None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def train(self, mode: bool = True) -> Self:
        """Switch everything but the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def teach(self, images: Tensor) -> Tensor | None:
        """Return the teacher's logits [B, classes] of images [B, channels, height, width].

        None if there is no teacher.
        """
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.teacher(images).float()

    def begin_epoch(self, epoch: int) -> None:
        """Prepare epoch 0, 1, ...; also called for the first epoch after a resumption."""

    @abc.abstractmethod
    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Learn from a batch, at 0 <= progress < 1 of the run, and return the loss, [].

        Args:
            images: [B, channels, height, width].
            labels: [B].
            progress: Share of the run that lies behind.
        """


def run(
    learner: Learner, data: LearningData, epochs: int, seed: int, checkpoint: Path | None = None
) -> None:
    """Learn for some epochs.

    Args:
        learner: The run.
        data: Images.
        epochs: Epochs of the whole run.
        seed: Every random number of epoch e depends on it and e alone.
        checkpoint: File that the state is written to after each epoch, and read from where it
            exists: the run then goes on behind the last whole epoch. It starts again where the
            version before wrote it, whose optimisers decayed vectors too.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If there are no batches, or if the checkpoint is damaged.
    """
    device = next(learner.vit.parameters()).device
    done = _resume(learner, checkpoint, device) if checkpoint and checkpoint.exists() else 0
    for epoch in range(done, epochs):
        torch.manual_seed(seed * 1_009 + epoch)
        learner.begin_epoch(epoch)
        learner.train()
        loss, steps = torch.zeros((), device=device), 0
        for images, labels in data.train(epoch):
            progress = (epoch + min(1.0, steps / data.steps)) / epochs
            loss = loss + learner.step(images.to(device), labels.to(device), progress).detach()
            steps += 1
        if steps == 0:
            raise ValueError("an epoch has no batches; give more images or a smaller batch_size")
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"loss is {loss.item()} in learning epoch {epoch + 1}")
        if checkpoint is not None:
            _write(learner, checkpoint, epoch + 1)


def _write(learner: Learner, checkpoint: Path, done: int) -> None:
    state: dict[str, Any] = {
        "done": done,
        "learner": learner.state_dict(),
        "optimizers": {name: o.state_dict() for name, o in learner.optimizers.items()},
    }
    replace_file(checkpoint, lambda temporary: save_sealed(state, temporary))


def _resume(learner: Learner, checkpoint: Path, device: torch.device) -> int:
    state = load_sealed(checkpoint, device)
    try:
        done: int = state["done"]
        if any(_regrouped(state["optimizers"][n], o) for n, o in learner.optimizers.items()):
            return 0
        learner.load_state_dict(state["learner"])
        for name, optimizer in learner.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if type(done) is not int or done < 0:
            raise ValueError(f"done is {done!r}")
    except Exception as error:  # of what does not fit, torch raises what comes
        raise ValueError(
            f"{checkpoint} is no state of this run; remove it, and the run starts again"
        ) from error
    return done


def _regrouped(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state holds as many parameters as an optimiser, but in other groups."""
    then, now = (
        [len(group["params"]) for group in groups]
        for groups in (saved["param_groups"], optimizer.param_groups)
    )
    return then != now and sum(then) == sum(now)
