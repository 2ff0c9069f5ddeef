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
from numpy.typing import NDArray
from torch import Tensor

from search.augment import crop_and_flip
from search.decode import Corrupt, ImageSpec, Pixels, decode_all
from search.shards import Shards, find_shards

LabelArray = NDArray[np.int64]

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
        corrupt: Names of the images that could not be read so far.
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

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None,
        augment: bool,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, channels, height, width], normalised, and labels [B], of one epoch.

        Args:
            batch_size: Images per batch.
            seed: Decides the order (and the augmentation); None keeps the order of the source. With
                a seed a last, smaller batch is left out, unless it is the only one.
            augment: Crop and flip at random.
            device: Where the tensors are made.
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        if self.table is None:
            source = self._stream(batch_size, seed)
        else:
            source = _mapped(self.table, self.spec, batch_size, seed)
        mean = torch.tensor(self.spec.mean, device=device).view(-1, 1, 1) * 255.0
        std = torch.tensor(self.spec.std, device=device).view(-1, 1, 1) * 255.0
        for position, (pixels, labels) in enumerate(source):
            if seed is not None and len(labels) < batch_size and position > 0:
                return
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)  # [B, C, H, W]
            if augment:
                images = crop_and_flip(images, padding=self.spec.size[0] // 8, generator=generator)
            yield (images.float() - mean) / std, torch.from_numpy(labels).to(device)

    def _stream(self, batch_size: int, seed: int | None) -> Iterator[tuple[Pixels, LabelArray]]:
        order, rng = self.shards.groups(), np.random.default_rng(seed)
        if seed is not None:
            rng.shuffle(order)
        held: list[tuple[Pixels, int]] = []
        # A generator that is dropped early must not leave threads behind: `with` closes the pool.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for rows in self.shards.read_groups(order):
                held += decode_all(rows, self.spec, self.corrupt, pool)
                while len(held) >= (WINDOW if seed is not None else 0) + batch_size:
                    yield _draw(held, batch_size, rng if seed is not None else None)
        while held:
            yield _draw(held, min(batch_size, len(held)), rng if seed is not None else None)


def _mapped(
    table: pa.Table, spec: ImageSpec, batch_size: int, seed: int | None
) -> Iterator[tuple[Pixels, LabelArray]]:
    order = np.arange(table.num_rows)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        rows = table.take(pa.array(order[start : start + batch_size])).combine_chunks()
        flat = np.frombuffer(rows.column("pixels").chunk(0).buffers()[1], dtype=np.uint8)
        pixels = flat.reshape(len(rows), *_pixel_shape(spec))
        yield pixels.copy(), rows.column("label").to_numpy().copy()  # torch wants writable memory


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
    fits = shards.rows * _pixel_bytes(spec) <= cache_gb * 1e9
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
        found = _map(path)
        if found is None:
            _decode_to(path, shards, spec, Corrupt(limit=max_corrupt, names=[]))
            found = _map(path)
    if found is None or found[0].num_rows == 0:
        raise ValueError(f"{source} has no readable images; give at least one")
    table, names = found
    for name in names:  # decoded before, perhaps under a larger limit
        corrupt.add(name, "found while decoding")
    return Images(
        spec=spec, digest=digest, count=table.num_rows, table=table, shards=shards, corrupt=corrupt
    )


def default_cache() -> Path:
    """Return the user's cache folder for decoded images."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prunefront"


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


def _decode_to(path: Path, shards: Shards, spec: ImageSpec, corrupt: Corrupt) -> None:
    """Decode a split into an Arrow file, and a note beside it that says that the file is whole."""
    schema = pa.schema([("pixels", pa.binary(_pixel_bytes(spec))), ("label", pa.int64())])
    temporary, written = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with (
            ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for rows in shards.read_groups(shards.groups()):
                batch = _record_batch(list(decode_all(rows, spec, corrupt, pool)), schema)
                writer.write_batch(batch)
                written += batch.num_rows
        os.replace(temporary, path)
        temporary.write_text(json.dumps({"rows": written, "corrupt": corrupt.names}))
        os.replace(temporary, path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)


def _map(path: Path) -> tuple[pa.Table, list[str]] | None:
    """Map a decoded split into memory; None if there is none, or if it is torn."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (FileNotFoundError, json.JSONDecodeError, pa.ArrowInvalid):
        return None
    return (table, note["corrupt"]) if table.num_rows == note["rows"] else None


def _record_batch(images: list[tuple[Pixels, int]], schema: pa.Schema) -> pa.RecordBatch:
    kind = schema.field("pixels").type
    pixels = (
        np.stack([p for p, _ in images]) if images else np.empty((0, kind.byte_width), np.uint8)
    )
    array = pa.Array.from_buffers(kind, len(images), [None, pa.py_buffer(pixels.tobytes())])
    labels = pa.array([label for _, label in images], pa.int64())
    return pa.RecordBatch.from_arrays([array, labels], schema=schema)


def _draw(
    held: list[tuple[Pixels, int]], count: int, rng: np.random.Generator | None
) -> tuple[Pixels, LabelArray]:
    """Take `count` images out of `held`: at random, or the first."""
    if rng is not None:
        for slot in range(count):
            other = int(rng.integers(slot, len(held)))
            held[slot], held[other] = held[other], held[slot]
    drawn = held[:count]
    del held[:count]
    return np.stack([p for p, _ in drawn]), np.array([label for _, label in drawn], dtype=np.int64)


def _pixel_shape(spec: ImageSpec) -> tuple[int, int, int]:
    return (*spec.size, spec.channels)


def _pixel_bytes(spec: ImageSpec) -> int:
    return spec.size[0] * spec.size[1] * spec.channels
