from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from search.data.shards import find_shards
from tests.conftest import labelled, write_images


def write_classes(path: Path, metadata: Any) -> None:
    """Write into a Parquet file what `datasets` writes: its features, as JSON."""
    table = pq.read_table(path)
    content = {b"huggingface": json.dumps(metadata).encode()}
    pq.write_table(table.replace_schema_metadata(content), path)


def features(names: Any) -> dict[str, Any]:
    label = {"names": names, "_type": "ClassLabel"}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}


def test_classes_have_the_names_that_hugging_face_wrote(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", *labelled(4, 0))
    assert find_shards(str(path)).classes == ()
    write_classes(path, features(["cat", "dog", "é"]))
    assert find_shards(str(path)).classes == ("cat", "dog", "é")
    assert find_shards(str(path)).rows == 4


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [],
        {"info": None},
        {"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}},
        features("cat"),
        features([1, 2]),
        features(None),
    ],
)
def test_other_metadata_name_no_classes(metadata: Any, tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", *labelled(4, 0))
    write_classes(path, metadata)
    assert find_shards(str(path)).classes == ()
