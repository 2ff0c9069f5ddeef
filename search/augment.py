"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels (black moves in) and mirror half of them.

    Args:
        images: [B, C, H, W], any type.
        padding: Largest shift, in pixels, in each direction.
        generator: Source of randomness, on the CPU.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)  # [B, C, H + 2p, W + 2p]
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    across = torch.arange(width).expand(count, -1)
    columns = left + torch.where(mirrored, width - 1 - across, across)  # [B, W]
    rows = top + torch.arange(height)  # [B, H]
    index = torch.arange(count).view(-1, 1, 1)
    device = images.device
    cut = padded.permute(0, 2, 3, 1)[
        index.to(device), rows.unsqueeze(2).to(device), columns.unsqueeze(1).to(device)
    ]  # [B, H, W, C]
    return cut.permute(0, 3, 1, 2)
