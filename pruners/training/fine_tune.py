"""Fine-tuning of a pruned model, with the dense model as teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruners.model.masks import apply_masks
from pruners.model.tokens import TokenReducer
from pruners.model.types import Batches
from pruners.model.vit import ViT
from pruners.training.loss import TaughtLoss
from pruners.training.optimisation import (
    NonFiniteLossError,
    clip_and_step,
    decayed,
    schedule_factor,
)
from pruners.training.peers import PeerOutOfMemoryError, Peers
from pruners.training.recipe import Recipe

TaughtBatches = Iterable[tuple[Tensor, Tensor, Tensor | None]]
"""Images and labels as in `Batches`, and the teacher's logits [B, classes], or None to ask it."""

_CHECK_EVERY = 10  # steps; reading the loss waits for the device


class TrainingLeftError(RuntimeError):
    """An epoch was left before its end, as was asked for; `state_dict` says where."""


class FineTuner:
    """Trains a model epoch by epoch; zeros stay zero.

    The teacher's logits come with the batches, or from the teacher itself.

    Attributes:
        loss: What is minimised.
        parts: In how many parts a batch is passed through the model, whose gradients add up: more
            need less memory. The update is the same but for rounding, and for what is random or
            compares images of a batch (drop path, the losses of token selectors).
        peers: The processes that train the same model, if there are several; all pass the same
            number of batches, each its own images of them. The update is that of the whole batch,
            as exactly as with `parts`; what ends an epoch early ends it in all of them at once.
        steps: Batches of the running epoch so far; 0 between epochs.
    """

    def __init__(
        self,
        vit: ViT,
        recipe: Recipe,
        steps_per_epoch: int,
        teacher: ViT | None = None,
    ) -> None:
        """Prepare the optimiser.

        Args:
            vit: The model.
            recipe: How it is trained.
            steps_per_epoch: Batches of an epoch.
            teacher: The dense model, on the same device; not needed without distillation, or where
                all batches carry its logits and the model has no `token_loss`.
        """
        self.vit, self.recipe, self.teacher = vit, recipe, teacher
        self.loss = TaughtLoss(vit, recipe, teacher)
        self.parts, self.steps = 1, 0
        self.peers: Peers | None = None
        self.device = next(vit.parameters()).device
        self._total = torch.zeros((), device=self.device)  # loss of the running epoch so far
        self._random: dict[str, Tensor] | None = None  # generators of an epoch that goes on
        vit.use_fused_attention(fused=self.device.type == "cuda")
        total = max(1, recipe.epochs * steps_per_epoch)
        self.selectors = [
            m for m in vit.modules() if isinstance(m, TokenReducer) and m.starts_untrained
        ]
        self.settles_at = round((1.0 - recipe.selector_settle) * total)
        self.optimizer = torch.optim.AdamW(_groups(vit, self.selectors, recipe))
        alone = recipe.selector_alone if self.selectors else 0.0
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            [
                partial(schedule_factor, total=total, warmup=recipe.warmup, frozen=frozen)
                for frozen in (alone, alone, 0.0, 0.0)[: len(self.optimizer.param_groups)]
            ],
        )

    def train_epoch(self, batches: Batches) -> float:
        """Train on the batches, asking the teacher if there is one, and return the mean loss.

        Raises:
            NonFiniteLossError: If the loss is not finite.
            ValueError: If there are no batches, or if the recipe distils and there is no teacher.
        """
        return self.train_taught((images, labels, None) for images, labels in batches)

    def train_taught(
        self, batches: TaughtBatches, leave: Callable[[], bool] = lambda: False
    ) -> float:
        """Train on batches that carry the teacher's logits, and return the mean loss.

        Args:
            batches: Of one epoch; if it was left and goes on, those that it has not had.
            leave: Asked after each batch whether to stop there.

        Raises:
            NonFiniteLossError: If the loss is not finite.
            PeerOutOfMemoryError: If another of the `peers` ran out of memory.
            TrainingLeftError: If `leave` says so, in any of the `peers`.
            ValueError: If there are no batches, or if a teacher is needed and there is none.
        """
        self.vit.train()
        self._restore_generators()
        layers = dict(self.vit.linears())
        masks = {site: mask.to(self.device) for site, mask in self.vit.masks.items()}
        for images, labels, answers in batches:
            self._total += self._step(images.to(self.device), labels.to(self.device), answers)
            apply_masks(layers, masks)
            self.steps += 1
            if self.steps % _CHECK_EVERY == 0:
                _check_finite(self._total, self.steps)
            if self._is_left(leave()):
                raise TrainingLeftError(f"left after {self.steps} steps of the epoch")
        if self.steps == 0:
            raise ValueError("an epoch has no batches; give more images or a smaller batch_size")
        _check_finite(self._total, self.steps)
        mean = self._total.item() / self.steps
        self._total, self.steps = torch.zeros_like(self._total), 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser, the schedule, the running epoch and the random generators."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            "total": self._total.cpu(),
            "generators": generators,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps, self._total = state["steps"], state["total"].to(self.device)
        self._random = state["generators"] if self.steps else None

    def _restore_generators(self) -> None:
        """Let an epoch that goes on draw what it would have drawn."""
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], self.device)
        self._random = None

    def _is_left(self, left: bool) -> bool:
        return left if self.peers is None else self.peers.any(left)[0]

    def _step(self, images: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
        if self.schedule.last_epoch >= self.settles_at:
            for selector in self.selectors:
                selector.eval()
        self.optimizer.zero_grad(set_to_none=True)
        if self.peers is None:
            loss = self._backward(images, labels, answers)
        else:
            loss = self._backward_with(self.peers, images, labels, answers)
        clip_and_step([self.optimizer], self.vit.parameters(), norm=self.recipe.clip)
        self.schedule.step()
        return loss

    def _backward(self, images: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
        """Leave the gradients of a batch's mean loss, and return the loss."""
        size = -(-len(labels) // self.parts)
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            of_part = self.loss(
                images[part], labels[part], None if answers is None else answers[part]
            ) * (len(labels[part]) / len(labels))
            of_part.backward()
            loss += of_part.detach()
        return loss

    def _backward_with(
        self, peers: Peers, images: Tensor, labels: Tensor, answers: Tensor | None
    ) -> Tensor:
        """Do the same for a batch of which this process has a share, perhaps of no image."""
        loss, failure = torch.zeros((), device=self.device), None
        try:
            if len(labels) > 0:
                loss = self._backward(images, labels, answers)
        except (MemoryError, RuntimeError) as error:
            if not peers.out_of_memory(error):
                raise
            failure = error
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        failed, *reached = peers.any(failure is not None, *(p.grad is not None for p in trained))
        if failed:
            raise failure or PeerOutOfMemoryError("a process that trains this model too did")
        moved = [p for p, is_reached in zip(trained, reached, strict=True) if is_reached]
        for p in moved:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        peers.average([*(p.grad for p in moved), loss], len(labels))
        return loss


def _groups(vit: ViT, selectors: Sequence[TokenReducer], recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimiser's groups: matrices and vectors, then those of untrained selectors."""
    untrained = {id(p) for selector in selectors for p in selector.parameters()}
    groups = []
    for lr, new in ((recipe.lr, False), (recipe.selector_lr, True))[: 1 + bool(untrained)]:
        members = [p for p in vit.parameters() if (id(p) in untrained) == new]
        groups += decayed(members, recipe.weight_decay, lr=lr)
    return groups


def _check_finite(total: Tensor, steps: int) -> None:
    if not torch.isfinite(total):
        raise NonFiniteLossError(
            f"loss is {total.item()} within the first {steps} steps of the epoch"
        )
