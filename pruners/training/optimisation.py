"""What every training loop shares: learning rate, precision, distillation, losses that fail."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]


class NonFiniteLossError(ArithmeticError):
    """The training loss became infinite or not a number."""


def distillation(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(targets / T) || softmax(logits / T)), averaged over the batch.

    Args:
        logits: [B, classes] of the student.
        targets: [B, classes] logits of the teacher.
        temperature: T.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(targets / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


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

    "auto" takes bfloat16 only where the hardware multiplies it natively: elsewhere it is emulated
    and slower than float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Where torch is too old to say what the CPU has, float32 is right on any.
            features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
            native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bfloat16" else None
