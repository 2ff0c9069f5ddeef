"""The cache of decoded images: an Arrow file per split and node, which its processes share.

A file without its note, or that differs from it, is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pruners.model.files import replace_file
from search.data.decode import Corrupt, ImageSpec, Pixels, decode_all
from search.data.shards import Shards

Numbers = NDArray[np.int64]


def default_cache() -> Path:
    """Return the user's cache folder for decoded images."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prunefront"


def fits_cache(shards: Shards, spec: ImageSpec, cache_gb: float) -> bool:
    """Whether a split is cached: its decoded size is at most `cache_gb` (1e9 bytes)."""
    return shards.rows * _pixel_bytes(spec) <= cache_gb * 1e9


def write_decoded(path: Path, shards: Shards, spec: ImageSpec, corrupt: Corrupt) -> None:
    """Decode a split into an Arrow file, and note its rows, labels and corrupt images beside it.

    Args:
        path: The file.
        shards: The source.
        spec: How the images are prepared.
        corrupt: Counts those that cannot be read.

    Raises:
        ValueError: If more images are corrupt than allowed.
    """
    rows = replace_file(path, lambda temporary: _write_arrow(temporary, shards, spec, corrupt))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    note = json.dumps({"rows": rows, "corrupt": corrupt.names, "labels": _labels_digest(table)})
    replace_file(path.with_suffix(".json"), lambda temporary: temporary.write_text(note))


def _write_arrow(path: Path, shards: Shards, spec: ImageSpec, corrupt: Corrupt) -> int:
    """Decode a split into an Arrow file, and return the number of its images."""
    written = 0
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, _schema(spec)) as writer,
    ):
        for chunk in shards.read_groups(shards.groups()):
            decoded = list(decode_all(chunk.files, spec, corrupt, pool))
            numbers = np.array([number for _, number in decoded], dtype=np.int64)
            labels = chunk.labels[numbers - chunk.first]
            writer.write_batch(_record_batch([p for p, _ in decoded], labels, numbers, spec))
            written += len(decoded)
    return written


def open_decoded(path: Path, spec: ImageSpec, rows: int) -> tuple[pa.Table, list[str]] | None:
    """Map a decoded split into memory; None if it is absent or damaged.

    Args:
        path: The file of the decoded images.
        spec: How they are prepared.
        rows: Rows of the source.

    Returns:
        The images, and the names of those that could not be read.
    """
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        names = [str(name) for name in note["corrupt"]]
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate()  # Arrow trusts what a file says of the places of its columns
        whole = (
            table.schema == _schema(spec)
            and table.num_rows == note["rows"] == rows - len(names)
            and not any(column.null_count for column in table.columns)
            and _labels_digest(table) == note["labels"]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):
        return None
    return (table, names) if whole else None


def _labels_digest(table: pa.Table) -> str:
    """SHA-256 of the labels and numbers of decoded images; the pixels would take long."""
    digest = hashlib.sha256()
    for name in ("label", "number"):
        digest.update(table.column(name).to_numpy().tobytes())
    return digest.hexdigest()


def _schema(spec: ImageSpec) -> pa.Schema:
    pixels = pa.binary(_pixel_bytes(spec))
    return pa.schema([("pixels", pixels), ("label", pa.int64()), ("number", pa.int64())])


def _record_batch(
    images: list[Pixels], labels: Numbers, numbers: Numbers, spec: ImageSpec
) -> pa.RecordBatch:
    schema = _schema(spec)
    pixels = np.stack(images) if images else np.empty((0, _pixel_bytes(spec)), np.uint8)
    array = pa.Array.from_buffers(
        schema.field("pixels").type, len(images), [None, pa.py_buffer(pixels.tobytes())]
    )
    return pa.RecordBatch.from_arrays([array, pa.array(labels), pa.array(numbers)], schema=schema)


def _pixel_bytes(spec: ImageSpec) -> int:
    return spec.size[0] * spec.size[1] * spec.channels
