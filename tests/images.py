"""Small images in Parquet files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def random_pixels(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_images(
    path: Path, files: list[bytes | None], labels: list[int], group: int = 10_000
) -> Path:
    """Write a Parquet file in the Hugging Face image schema."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{path.stem}/{i}.png"} for i, data in enumerate(files)]
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=group)
    return path


def labelled(count: int, seed: int) -> tuple[list[bytes | None], list[int]]:
    """Images of five classes that differ in brightness, so that there is something to learn."""
    labels = [(i * 7 + seed) % 5 for i in range(count)]
    noise = random_pixels(count, 24, 16, seed).astype(int) - 128
    pixels = [np.clip(25 + 50 * c + n // 4, 0, 255) for c, n in zip(labels, noise, strict=True)]
    return [png(p.astype(np.uint8)) for p in pixels], labels


def write_classes(path: Path, metadata: Any) -> None:
    """Write into a Parquet file what `datasets` writes: its features, as JSON."""
    table = pq.read_table(path)
    content = {b"huggingface": json.dumps(metadata).encode()}
    pq.write_table(table.replace_schema_metadata(content), path)


def features(names: Any) -> dict[str, Any]:
    label = {"names": names, "_type": "ClassLabel"}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
