"""The fine-tuning of a trial's model: its recipe, and the batches of each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from pruners import PrunableViT
from pruners.training.fine_tune import FineTuner
from pruners.training.peers import Peers
from pruners.training.recipe import Recipe
from search.data.augment import Epoch
from search.data.splits import mixed_seed
from search.records.events import TrialConfig
from search.sweep.spec import Sweep
from search.trial.context import TrialContext


class Training:
    """Fine-tunes a model in one process, alone or as one of those that share every batch.

    Attributes:
        vit: The model.
        tuner: Its fine-tuner.
    """

    def __init__(
        self, context: TrialContext, config: TrialConfig, vit: PrunableViT, peers: Peers | None
    ) -> None:
        """Start before the first epoch.

        Args:
            context: What the process has opened.
            config: The trial's.
            vit: The model, on the device, cut already.
            peers: The other processes, if there are any.
        """
        self.context, self.config, self.vit, self.peers = context, config, vit, peers
        sweep, teacher = context.sweep, context.teacher
        steps = max(1, len(context.train_images) // sweep.data.batch_size)
        recipe = Recipe(epochs=config.epochs, **sweep.finetune.model_dump(exclude={"augment"}))
        distils = recipe.distill > 0.0
        # A loss on tokens compares them with the teacher's own, which are too many to keep.
        kept = vit.token_loss is None and teacher.fits(recipe.epochs)
        self._answered = distils and kept
        self.tuner = FineTuner(vit, recipe, steps, teacher.live if distils and not kept else None)
        self.tuner.parts = config.parts
        self.tuner.peers = peers

    def train(self, epoch: int) -> float:
        """Train an epoch, or what is left of one; return its mean loss.

        Args:
            epoch: Its number, from 1.

        Raises:
            TrainingLeftError: If the process is to end.
        """
        return self.tuner.train_taught(self.batches(epoch), self.context.notice.given)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield this process's share of the batches of an epoch that are left.

        Yields:
            Images [B, channels, height, width], labels [B], and the teacher's logits [B, classes],
            if they are kept.
        """
        context, config, done = self.context, self.config, self.tuner.steps
        stream = Epoch(mixed_seed(context.sweep.seed, config.seed), epoch)
        answers = context.teacher.answers(stream) if self._answered else None
        if done == 0:  # else the generators are where they were
            torch.manual_seed(self._seed(epoch))  # dropout and drop path
        batches = context.train_images.numbered(
            context.sweep.data.batch_size,
            order=stream,
            views=stream if context.sweep.finetune.augment else None,
            device=context.device,
            share=(0, 1) if self.peers is None else (self.peers.rank, self.peers.size),
        )
        for images, labels, rows in islice(batches, done, None):
            yield images, labels, None if answers is None else torch.from_numpy(answers[rows])

    def _seed(self, epoch: int) -> int:
        seed, rank = trial_seed(self.context.sweep, self.config, epoch), 0
        if self.peers is not None:
            rank = self.peers.rank
        return mixed_seed(seed, rank) if rank else seed  # dropout of its own in each process


def trial_seed(sweep: Sweep, config: TrialConfig, epoch: int) -> int:
    """Return the seed of all that is drawn in an epoch of a trial, apart from its images."""
    return mixed_seed(sweep.seed, config.seed, int(config.trial), epoch)
