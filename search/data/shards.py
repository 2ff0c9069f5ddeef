"""The Parquet files of a labelled image set: found, checked, and read row group by row group."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

CHUNK = 1024
"""Rows per chunk."""


class Group(NamedTuple):
    """A row group of a shard; `first` is the number of its first row, over all shards in order."""

    path: str
    number: int
    first: int


class Chunk(NamedTuple):
    """Rows that follow each other.

    Attributes:
        files: Name, content and number of each row; numbers run over all shards in order.
        labels: [rows].
    """

    files: list[tuple[str, bytes | None, int]]
    labels: NDArray[np.int64]

    @property
    def first(self) -> int:
        """Number of the first row."""
        return self.files[0][2]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The Parquet files of a split, and the columns to read.

    Attributes:
        filesystem: Where they are.
        paths: The files, in order of their names.
        image_column: Column of the image files.
        label_column: Column of the labels.
        rows: Rows of all files.
        classes: Names of the classes, where the files say them; else empty.
    """

    filesystem: pafs.FileSystem
    paths: tuple[str, ...]
    image_column: str
    label_column: str
    rows: int
    classes: tuple[str, ...]

    def read_groups(self, order: list[Group]) -> Iterator[Chunk]:
        """Yield the rows of the given row groups.

        Raises:
            ValueError: If a file is damaged, or a row has no label.
        """
        for path, group, first in order:
            with naming(path), self.filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source)
                table = file.read_row_group(group, columns=[self.image_column, self.label_column])
                table.validate(full=True)
            images, labels = (table.column(c) for c in (self.image_column, self.label_column))
            if labels.null_count:
                raise ValueError(
                    f"{path}, row group {group}: {self.label_column} is empty in "
                    f"{labels.null_count} rows; give each image a label"
                )
            numbers = labels.to_numpy().astype(np.int64)
            for start in range(0, table.num_rows, CHUNK):
                part = images.slice(start, CHUNK).to_pylist()
                files = [
                    (_name(image, path, group, row), (image or {}).get("bytes"), first + row)
                    for row, image in enumerate(part, start)
                ]
                yield Chunk(files=files, labels=numbers[start : start + CHUNK])

    def groups(self) -> list[Group]:
        """Return all row groups in order.

        Raises:
            ValueError: If a file is damaged.
        """
        groups: list[Group] = []
        first = 0
        for path in self.paths:
            with naming(path), self.filesystem.open_input_file(path) as source:
                metadata = pq.ParquetFile(source).metadata
            for number in range(metadata.num_row_groups):
                groups.append(Group(path, number, first))
                first += metadata.row_group(number).num_rows
        return groups


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in Arrow's errors.

    Raises:
        ValueError: Instead of Arrow's own errors, of damaged files and of storage that fails.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file ({_one_line(error)})") from error


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
    rows, classes = 0, _NO_NAMES
    for shard in paths:
        with naming(shard), filesystem.open_input_file(shard) as file:
            parquet = pq.ParquetFile(file)
            _check_columns(shard, parquet.schema_arrow, image_column, label_column)
            rows += parquet.metadata.num_rows
            classes = classes or _class_names(parquet.schema_arrow, label_column)
    if rows == 0:
        raise ValueError(f"{source} has no rows; give at least one image")
    return Shards(
        filesystem=filesystem,
        paths=tuple(paths),
        image_column=image_column,
        label_column=label_column,
        rows=rows,
        classes=classes,
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
        if schema.names.count(column) > 1:
            raise ValueError(f"{path} has several columns {column!r}; give one")
    image, label = schema.field(image_column).type, schema.field(label_column).type
    if not _is_image(image):
        raise ValueError(
            f"{path}: {image_column} is {_one_line(image)}; "
            "give struct<bytes: binary, path: string>"
        )
    if not pa.types.is_integer(label):
        raise ValueError(f"{path}: {label_column} is {_one_line(label)}; give integers from 0")


_NO_NAMES: tuple[str, ...] = ()


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the class names in a file's Hugging Face metadata; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _NO_NAMES
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if named else _NO_NAMES


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _name(image: dict[str, object] | None, path: str, group: int, row: int) -> str:
    return str((image or {}).get("path") or f"{path}, row group {group}, row {row}")
