"""What every training loop shares: loss, precision, weight decay, clipping, learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Precision = Literal["auto", "float32", "bfloat16"]

CLIP = 1.0
"""Largest gradient norm, where nothing else is said."""


class NonFiniteLossError(ArithmeticError):
    """The training loss became infinite or not a number."""


def distillation(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(targets / T) || softmax(logits / T)), averaged over the batch, [].

    Args:
        logits: [B, classes] of the student.
        targets: [B, classes] logits of the teacher.
        temperature: T.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(targets / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distilled_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    *,
    distill: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - distill) * cross-entropy + distill * `distillation`, averaged over the batch, [].

    Args:
        logits: [B, classes] of the student.
        labels: [B].
        targets: [B, classes] logits of the teacher; None leaves the cross-entropy alone.
        distill: Share of the distillation, 0 <= x <= 1.
        temperature: T.
        label_smoothing: Smoothing of the cross-entropy.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if targets is None:
        return loss
    return (1.0 - distill) * loss + distill * distillation(logits, targets, temperature)


def schedule_factor(step: int, total: int, warmup: float, frozen: float = 0.0) -> float:
    """Learning rate of step 0, 1, ... as a share of its peak: warm-up, then a cosine to 0.01.

    In the first `frozen` share of all steps it is 0.
    """
    if step < int(frozen * total):
        return 0.0
    rise = int(warmup * total)
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, total - rise))
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress))


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of training, or None for float32.

    "auto" takes bfloat16 only where the hardware has units for its products: tensor cores, or AMX.
    Elsewhere it is slower than float32, by half even with the vector instructions of AVX512-BF16.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Where torch is too old to say what the CPU has, float32 is right on any.
            features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
            native = bool(features.get("amx_bf16"))
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bfloat16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context of a forward pass in a type of `autocast_dtype`; None is float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def decayed(
    parameters: Iterable[nn.Parameter], weight_decay: float, **settings: Any
) -> list[dict[str, Any]]:
    """Return an optimiser's groups: matrices decay, vectors (biases, norms, scales) do not.

    Args:
        parameters: Of any shapes; those that are not trained are left out.
        weight_decay: Decoupled weight decay of the matrices.
        settings: What else holds for both groups.
    """
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, **settings},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, **settings},
    ]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def backward(loss: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Leave the gradients of a loss [], and of nothing before it, in what the optimisers move."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()


def clip_and_step(
    optimizers: Iterable[Optimizer], *clipped: Iterable[Tensor], norm: float = CLIP
) -> None:
    """Clip the gradients of each set of parameters [...] to a norm; then step."""
    for parameters in clipped:
        nn.utils.clip_grad_norm_(parameters, norm)
    for optimizer in optimizers:
        optimizer.step()
