from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.head import head_node


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of its own, as a person starts one; yields the submitter's environment."""
    with head_node(Path(tmp_path_factory.mktemp("token")) / "token") as environment:
        yield environment
