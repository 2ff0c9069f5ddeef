"""Labelled images in Parquet -> batches of tensors.

A source is one file, a glob or a directory of shards, local or at any URI that `pyarrow.fs` knows,
in the Hugging Face image schema: `image: struct<bytes, path>`, `label: int64`.

Up to a stated size a split is decoded once per node into an Arrow file, which all processes of the
node map into memory; a larger split is streamed, row group by row group.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from search.data.augment import Epoch, crop_and_flip, draw_views
from search.data.cache import (
    Numbers,
    default_cache,
    fits_cache,
    open_decoded,
    write_decoded,
)
from search.data.decode import Corrupt, ImageSpec, Pixels, decode_all
from search.data.shards import Shards, find_shards

WINDOW = 4096
"""Images that a stream holds to shuffle among."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """A split of labelled images, prepared for a model.

    Attributes:
        spec: How the images are prepared.
        digest: SHA-256 of the source and the preparation.
        count: Images that can be read (of a stream: rows, corrupt ones included).
        table: The decoded images, mapped into memory, or None for a stream.
        shards: The source.
        corrupt: Names of the images that could not be read; of a stream, in the latest pass.
    """

    spec: ImageSpec
    digest: str
    count: int
    table: pa.Table | None
    shards: Shards
    corrupt: Corrupt = field(default_factory=lambda: Corrupt(limit=0, names=[]))

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    @property
    def padding(self) -> int:
        """Largest shift of an augmented image, in pixels."""
        return self.spec.size[0] // 8

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None,
        epoch: int = 0,
        augment: bool,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, channels, height, width], normalised, and labels [B], of one epoch.

        Args:
            batch_size: Images per batch.
            seed: Decides, with the epoch, order and augmentation; None keeps the order of the
                source. With a seed a last, smaller batch is left out, unless it is the only one.
            epoch: Number of the pass.
            augment: Crop and flip at random.
            device: Where the tensors are made.
        """
        order = None if seed is None else Epoch(seed, epoch)
        views = Epoch(seed or 0, epoch) if augment else None
        for images, labels, _ in self.numbered(batch_size, order=order, views=views, device=device):
            yield images, labels

    def numbered(
        self,
        batch_size: int,
        *,
        order: Epoch | None,
        views: Epoch | None,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor, Numbers]]:
        """Yield batches as `batches` does, and the images' numbers [B]: their rows in the source.

        Args:
            batch_size: Images per batch.
            order: Decides the order, as a seed does in `batches`; None keeps that of the source.
            views: Decides how each image is cropped and flipped; None leaves it as it is.
            device: Where the tensors are made.
            share: (r, n) yields of each batch the images r, r + n, r + 2n, ..., perhaps none.
        """
        if self.table is None:
            source = self._stream(batch_size, order)
        else:
            source = _mapped(self.table, self.spec, batch_size, order)
        mean = torch.tensor(self.spec.mean, device=device).view(-1, 1, 1) * 255.0
        std = torch.tensor(self.spec.std, device=device).view(-1, 1, 1) * 255.0
        own = slice(share[0], None, share[1])
        for position, batch in enumerate(source):
            if order is not None and len(batch[1]) < batch_size and position > 0:
                return
            pixels, labels, numbers = batch[0][own], batch[1][own], batch[2][own]
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)  # [B, C, H, W]
            if views is not None:
                drawn = draw_views(views, numbers, self.padding)
                images = crop_and_flip(images, drawn, self.padding)
            yield (images.float() - mean) / std, torch.from_numpy(labels).to(device), numbers

    def _stream(
        self, batch_size: int, order: Epoch | None
    ) -> Iterator[tuple[Pixels, Numbers, Numbers]]:
        groups, rng = self.shards.groups(), _generator(order)
        self.corrupt.names.clear()  # each pass counts them anew
        if rng is not None:
            rng.shuffle(groups)
        held: list[tuple[Pixels, int, int]] = []
        # A generator that is dropped early must not leave threads behind: `with` closes the pool.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for chunk in self.shards.read_groups(groups):
                held += [
                    (pixels, int(chunk.labels[number - chunk.first]), number)
                    for pixels, number in decode_all(chunk.files, self.spec, self.corrupt, pool)
                ]
                while len(held) >= (WINDOW if rng is not None else 0) + batch_size:
                    yield _draw(held, batch_size, rng)
        while held:
            yield _draw(held, min(batch_size, len(held)), rng)


def _mapped(
    table: pa.Table, spec: ImageSpec, batch_size: int, order: Epoch | None
) -> Iterator[tuple[Pixels, Numbers, Numbers]]:
    positions, rng = np.arange(table.num_rows), _generator(order)
    if rng is not None:
        rng.shuffle(positions)
    for start in range(0, len(positions), batch_size):
        part = table.take(pa.array(positions[start : start + batch_size])).combine_chunks()
        flat = np.frombuffer(part.column("pixels").chunk(0).buffers()[1], dtype=np.uint8)
        pixels = flat.reshape(len(part), *spec.size, spec.channels)
        labels, numbers = (part.column(name).to_numpy() for name in ("label", "number"))
        yield pixels.copy(), labels.copy(), numbers  # torch wants writable memory


def _generator(order: Epoch | None) -> np.random.Generator | None:
    return None if order is None else np.random.default_rng((order.seed, order.number))


def open_images(
    source: str,
    spec: ImageSpec,
    *,
    cache_dir: str | None = None,
    cache_gb: float = 8.0,
    max_corrupt: int = 0,
    image_column: str = "image",
    label_column: str = "label",
) -> Images:
    """Open a split.

    Args:
        source: File, glob, directory or URI.
        spec: How images are prepared.
        cache_dir: Where decoded images are kept on this node; None is the user's cache folder.
        cache_gb: A split whose decoded size is larger (in 1e9 bytes) is streamed instead.
        max_corrupt: Unreadable images that are skipped; one more is an error.
        image_column: Column of the image files.
        label_column: Column of the labels.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it is not such a Parquet file, or has more corrupt images than allowed.
    """
    shards = find_shards(source, image_column, label_column)
    fits = fits_cache(shards, spec, cache_gb)
    digest = _digest(shards, spec, whole=fits)
    corrupt = Corrupt(limit=max_corrupt, names=[])
    if not fits:
        return Images(
            spec=spec, digest=digest, count=shards.rows, table=None, shards=shards, corrupt=corrupt
        )
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest}.arrow"
    with FileLock(path.with_suffix(".lock")):  # of the processes of a node, one decodes
        found = open_decoded(path, spec, shards.rows)
        if found is None:
            write_decoded(path, shards, spec, Corrupt(limit=max_corrupt, names=[]))
            found = open_decoded(path, spec, shards.rows)
    if found is None or found[0].num_rows == 0:
        raise ValueError(f"{source} has no readable images; give at least one")
    table, names = found
    for name in names:  # decoded before, perhaps under a larger limit
        corrupt.add(name, "found while decoding")
    return Images(
        spec=spec, digest=digest, count=table.num_rows, table=table, shards=shards, corrupt=corrupt
    )


def data_digest(
    source: str, spec: ImageSpec, *, cache_gb: float, image_column: str, label_column: str
) -> str:
    """Return the digest that `open_images` gives a split, without decoding it."""
    shards = find_shards(source, image_column, label_column)
    return _digest(shards, spec, whole=fits_cache(shards, spec, cache_gb))


def _digest(shards: Shards, spec: ImageSpec, *, whole: bool) -> str:
    """SHA-256 of the preparation and of the files: their bytes, or only sizes and footers."""
    digest = hashlib.sha256(
        json.dumps([asdict(spec), shards.image_column, shards.label_column]).encode()
    )
    for path in shards.paths:
        with shards.filesystem.open_input_file(path) as file:
            size = file.size()
            digest.update(f"{Path(path).name} {size}".encode())
            if not whole:
                file.seek(size - 8)
                footer = int.from_bytes(file.read(4), "little") + 8
                file.seek(size - footer)
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _draw(
    held: list[tuple[Pixels, int, int]], count: int, rng: np.random.Generator | None
) -> tuple[Pixels, Numbers, Numbers]:
    """Take pixels, labels and numbers of `count` images out of `held`: at random, or the first."""
    if rng is not None:
        for slot in range(count):
            other = int(rng.integers(slot, len(held)))
            held[slot], held[other] = held[other], held[slot]
    drawn = held[:count]
    del held[:count]
    labels, numbers = np.array([row[1:] for row in drawn], dtype=np.int64).T
    return np.stack([row[0] for row in drawn]), labels.copy(), numbers
