"""The loss of fine-tuning: that of a recipe, with a teacher, and the model's own."""

from __future__ import annotations

import torch
from torch import Tensor

from pruners.model.tokens import Tokens
from pruners.model.vit import ViT
from pruners.training.optimisation import autocast, autocast_dtype
from pruners.training.recipe import Recipe


class TaughtLoss:
    """(1 - distill) * CE + distill * T^2 * KL(teacher || student), plus the model's own `aux_loss`.

    The divergence is summed over classes and averaged over the batch (Hinton et al., 2015,
    arXiv:1503.02531).

    Attributes:
        teacher: The dense model, or None where it need not be asked.
    """

    def __init__(self, vit: ViT, recipe: Recipe, teacher: ViT | None) -> None:
        """Hold the models; neither is changed."""
        self.vit, self.recipe, self.teacher = vit, recipe, teacher
        self.device = next(vit.parameters()).device
        self.autocast = autocast_dtype(recipe.precision, self.device)

    def __call__(self, images: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
        """Return the mean loss of a batch, [].

        Args:
            images: [B, channels, height, width], on the model's device.
            labels: [B].
            answers: The teacher's logits [B, classes], or None to ask it.

        Raises:
            ValueError: If the teacher has to be asked and there is none.
        """
        with autocast(self.device, self.autocast):
            tokens = self.vit.tokens(images)
            logits = self.vit.classify(tokens).float()
            taught, targets = self._teach(images, answers)
            aux = self.vit.aux_loss(tokens, taught).float()
        return self.recipe.loss(logits, labels, targets) + aux

    def _teach(self, images: Tensor, answers: Tensor | None) -> tuple[Tokens | None, Tensor | None]:
        """Return the teacher's tokens, where it has to be asked, and its logits [B, classes]."""
        if self.recipe.distill == 0.0:
            return None, None
        if answers is not None and self.vit.token_loss is None:
            return None, answers.to(self.device).float()
        if self.teacher is None:
            lacking = "logits" if answers is None else "tokens, which token_loss compares"
            raise ValueError(
                f"distill is {self.recipe.distill} but there is no teacher to ask for "
                f"{lacking}; give one, or distill = 0"
            )
        with torch.no_grad():
            taught = self.teacher.tokens(images)
            return taught, self.teacher.classify(taught).float()
