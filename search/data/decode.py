"""Bytes of an image file -> pixels of a fixed size; unreadable images are counted and named."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are decoded; Pillow opens more, some of them by running other programs."""

LARGEST_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded: they could fill the memory."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How images are prepared for a model.

    Attributes:
        size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB.
        mean: Mean per channel of pixel values in 0..1.
        std: Standard deviation per channel.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the channels.

        Raises:
            ValueError: If images cannot be decoded to that many channels.
        """
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; image files give 1 (grey) or 3 (RGB)")


@dataclass(frozen=True, kw_only=True)
class Corrupt:
    """Images that could not be read."""

    limit: int
    names: list[str]

    def add(self, name: str, reason: str) -> None:
        """Count one more.

        Raises:
            ValueError: If there are now more than the limit.
        """
        name, reason = (" ".join(words.split()) for words in (name, reason))  # one line
        self.names.append(name)
        if len(self.names) > self.limit:
            raise ValueError(
                f"image {name} is corrupt ({reason}) and {len(self.names)} are, more than "
                f"max_corrupt = {self.limit}; the first are {', '.join(self.names[:5])}"
            )


def decode(data: bytes | None, spec: ImageSpec) -> Pixels:
    """Decode an image to [height, width, channels], 0..255.

    An image of another size is scaled (bicubic) until it covers the target and cut at its centre.

    Raises:
        ValueError: If it is no image, or too large a one.
    """
    if data is None:
        raise ValueError("no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            picture = image.convert("RGB" if spec.channels == 3 else "L")
    except Exception as error:  # Pillow's decoders raise any of many on a damaged file
        raise ValueError(str(error) or type(error).__name__) from error
    height, width = spec.size
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8).reshape(height, width, spec.channels)


def decode_all(
    rows: Iterable[tuple[str, bytes | None, int]],
    spec: ImageSpec,
    corrupt: Corrupt,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Pixels, int]]:
    """Decode (name, bytes, number) rows in order and skip, counting them, corrupt ones."""

    def attempt(row: tuple[str, bytes | None, int]) -> tuple[Pixels | None, str]:
        try:
            return decode(row[1], spec), ""
        except ValueError as error:
            return None, str(error)

    rows = list(rows)
    for (name, _, number), (pixels, reason) in zip(rows, pool.map(attempt, rows), strict=True):
        if pixels is None:
            corrupt.add(name, reason)
        else:
            yield pixels, number
