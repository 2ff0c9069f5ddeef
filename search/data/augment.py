"""Random crops and flips of a whole batch at once, decided by (seed, epoch, image) alone.

Nothing is drawn from a generator, whose state would depend on earlier draws: each image's number is
hashed with the epoch's key. So an image looks the same in an epoch whatever the order, the batch
and the device, and the dense model's logits of it can be looked up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd: the step of SplitMix64's counter."""


class Epoch(NamedTuple):
    """Seed of the order and the augmentation of one pass over the images.

    Attributes:
        seed: Of all passes; at least 0.
        number: Which pass; at least 0.
    """

    seed: int
    number: int = 0


class Views(NamedTuple):
    """How a batch of images is cut and mirrored.

    Attributes:
        top: [B], first row of the cut in the padded image, 0 to 2 * padding.
        left: [B], first column.
        mirrored: [B], whether left and right change places.
    """

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


def draw_views(epoch: Epoch, rows: NDArray[np.int64], padding: int) -> Views:
    """Draw a view of each image, uniformly.

    Args:
        epoch: Key of the draw, together with each image's number.
        rows: [B], the images' numbers.
        padding: Largest shift in pixels.
    """
    bits = _split_mix(_key(epoch) + rows.astype(np.uint64) * GOLDEN)  # [B]
    choices = np.uint64(2 * padding + 1)  # 31 bits each: no choice is likelier by more than 1e-7
    top = ((bits >> np.uint64(33)) * choices) >> np.uint64(31)
    left = (((bits >> np.uint64(2)) & np.uint64(0x7FFFFFFF)) * choices) >> np.uint64(31)
    mirrored = (bits & np.uint64(1)).astype(bool)
    return Views(top.astype(np.int64), left.astype(np.int64), mirrored)


def crop_and_flip(images: Tensor, views: Views, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels (black moves in) and mirror some of them.

    Args:
        images: [B, C, H, W], any type.
        views: One for each image.
        padding: Largest shift in pixels, in each direction.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)  # [B, C, H + 2p, W + 2p]
    top, left, mirrored = (torch.from_numpy(part).unsqueeze(1) for part in views)  # [B, 1] each
    across = torch.arange(width).expand(count, -1)
    columns = left + torch.where(mirrored, width - 1 - across, across)  # [B, W]
    rows = top + torch.arange(height)  # [B, H]
    index = torch.arange(count).view(-1, 1, 1)
    device = images.device
    cut = padded.permute(0, 2, 3, 1)[
        index.to(device), rows.unsqueeze(2).to(device), columns.unsqueeze(1).to(device)
    ]  # [B, H, W, C]
    return cut.permute(0, 3, 1, 2)


def _key(epoch: Epoch) -> NDArray[np.uint64]:
    """Mix seed and number into the [1] start of the epoch's counter."""
    start = _split_mix(np.array([epoch.seed % 2**64], dtype=np.uint64) + GOLDEN)
    return _split_mix(start + np.array([epoch.number % 2**64], dtype=np.uint64) * GOLDEN)


def _split_mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers: SplitMix64's output function (Steele et al., 2014, OOPSLA)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
