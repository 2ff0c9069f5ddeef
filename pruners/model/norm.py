"""RMSNorm of a stream that has lost channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm, RmsNormFp32
from torch import Tensor, nn

RMS_NORMS = (RmsNorm, RmsNormFp32, nn.RMSNorm)


class NarrowRMSNorm(nn.Module):
    """x / sqrt(sum(x^2) / width + eps) * weight, over the channels [..., D'] that are left.

    The channels that are gone count as zeros among the `width` that there were. So a cut is exactly
    a mask, and where they were close to zero the others keep their size. (A LayerNorm has no such
    form: zeros would move the mean.)

    Attributes:
        weight: [D'].
        eps: What is added to the mean square.
        width: Channels of the dense model.
    """

    def __init__(self, norm: nn.Module, width: int) -> None:
        """Take over an RMSNorm over all `width` channels."""
        super().__init__()
        eps = norm.eps
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self.eps = float(eps) if isinstance(eps, float) else torch.finfo(torch.float32).eps
        self.width = width

    @property
    def gain(self) -> float:
        """What an RMSNorm over the D' channels alone has to be multiplied by.

        Its eps is `gain` squared times this one's.
        """
        return math.sqrt(self.width / self.weight.numel())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., D']."""
        gone = self.width / x.shape[-1]
        return F.rms_norm(x, x.shape[-1:], self.weight * math.sqrt(gone), self.eps * gone)
