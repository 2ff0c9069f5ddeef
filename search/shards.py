"""The Parquet files of a labelled image set: found, checked, and read row group by row group."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

CHUNK = 1024
"""Rows that are handed on at a time."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The Parquet files of a split, and the columns to read."""

    filesystem: pafs.FileSystem
    paths: tuple[str, ...]
    image_column: str
    label_column: str
    rows: int

    def read_groups(
        self, order: list[tuple[str, int]]
    ) -> Iterator[list[tuple[str, bytes | None, int]]]:
        """Yield the (name, bytes, label) rows of the given (path, row group) pairs."""
        for path, group in order:
            with self.filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source)
                table = file.read_row_group(group, columns=[self.image_column, self.label_column])
            images, labels = table.column(self.image_column), table.column(self.label_column)
            for start in range(0, table.num_rows, CHUNK):
                part = images.slice(start, CHUNK).to_pylist()
                yield [
                    (_name(image, path, group, start + i), (image or {}).get("bytes"), int(label))
                    for i, (image, label) in enumerate(
                        zip(part, labels.slice(start, CHUNK).to_pylist(), strict=True)
                    )
                ]

    def groups(self) -> list[tuple[str, int]]:
        """Return all (path, row group) pairs in order."""
        pairs = []
        for path in self.paths:
            with self.filesystem.open_input_file(path) as source:
                pairs += [(path, g) for g in range(pq.ParquetFile(source).num_row_groups)]
        return pairs


def find_shards(source: str, image_column: str = "image", label_column: str = "label") -> Shards:
    """Find the Parquet files of a source, in order of their names, and check their columns.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If one is not Parquet, or lacks a column of the right type.
    """
    if "://" in source:
        filesystem, path = pafs.FileSystem.from_uri(source)
    else:
        filesystem, path = pafs.LocalFileSystem(), str(Path(source).absolute())
    paths = _expand(filesystem, path)
    if not paths:
        raise FileNotFoundError(
            f"{source} has no Parquet files; give a file, glob, directory or URI"
        )
    rows = 0
    for shard in paths:
        try:
            with filesystem.open_input_file(shard) as file:
                parquet = pq.ParquetFile(file)
                _check_columns(shard, parquet.schema_arrow, image_column, label_column)
                rows += parquet.metadata.num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(f"{shard} is not a Parquet file ({error})") from error
    if rows == 0:
        raise ValueError(f"{source} has no rows; give at least one image")
    return Shards(
        filesystem=filesystem,
        paths=tuple(paths),
        image_column=image_column,
        label_column=label_column,
        rows=rows,
    )


def _expand(filesystem: pafs.FileSystem, path: str) -> list[str]:
    wild = next(
        (i for i, part in enumerate(path.split("/")) if any(c in part for c in "*?[")), None
    )
    folder = path if wild is None else "/".join(path.split("/")[:wild])
    found = filesystem.get_file_info(folder)
    if wild is None and found.type == pafs.FileType.File:
        return [path]
    if found.type != pafs.FileType.Directory:
        return []
    files = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    paths = sorted(f.path for f in files if f.type == pafs.FileType.File)
    if wild is None:
        return [p for p in paths if p.endswith(".parquet")]
    return [p for p in paths if fnmatch.fnmatchcase(p, path) and p.count("/") == path.count("/")]


def _check_columns(path: str, schema: pa.Schema, image_column: str, label_column: str) -> None:
    for column in (image_column, label_column):
        if column not in schema.names:
            raise ValueError(f"{path} has no column {column!r}; its columns are {schema.names}")
    image, label = schema.field(image_column).type, schema.field(label_column).type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise ValueError(
            f"{path}: {image_column} is {image}; give struct<bytes: binary, path: string>"
        )
    if not pa.types.is_integer(label):
        raise ValueError(f"{path}: {label_column} is {label}; give integers from 0")


def _name(image: dict[str, object] | None, path: str, group: int, row: int) -> str:
    return str((image or {}).get("path") or f"{path}, row group {group}, row {row}")
