from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.data.shards import find_shards
from tests.images import features, labelled, write_classes, write_images


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
