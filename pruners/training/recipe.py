"""How a model is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pruners.training.optimisation import Precision, distilled_loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is fine-tuned.

    Attributes:
        epochs: Passes over the training set.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of matrices; vectors (biases, norms, scales) have none.
        warmup: Share of the steps in which the learning rate rises linearly; it then falls as a
            cosine to 1 % of `lr`.
        label_smoothing: Smoothing of the cross-entropy, 0 <= x < 1.
        clip: Largest gradient norm.
        distill: Share of the distillation term in the loss; 0 needs no teacher.
        temperature: Temperature of the distillation term.
        precision: "auto" takes bfloat16 autocast on hardware with units for its products.
        selector_lr: Peak learning rate of what a plan added and nobody has trained yet: the modules
            that select tokens.
        selector_alone: Share of the steps in which only these train, if there are any. The papers
            of DynamicViT and SPViT take 1/6, with `lr` at 1/100 of `selector_lr`.
        selector_settle: Share of the steps, the last ones, in which these are fixed and really
            remove tokens. Before, decisions are drawn at random, and as long as scores are close
            together a model sees other tokens in training than afterwards.
    """

    epochs: int = 3
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0
    clip: float = 1.0
    distill: float = 0.5
    temperature: float = 1.0
    precision: Precision = "auto"
    selector_lr: float = 1e-3
    selector_alone: float = 0.0
    selector_settle: float = 0.33

    def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Return (1 - distill) * CE + distill * T^2 * KL(teacher || student), [].

        Args:
            logits: [B, classes] of the student.
            labels: [B].
            targets: [B, classes] logits of the teacher; None leaves the cross-entropy alone.
        """
        return distilled_loss(
            logits,
            labels,
            targets,
            distill=self.distill,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
        )
