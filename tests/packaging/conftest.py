from __future__ import annotations

import pytest

from tests.packaging.wheel import Installed, install


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed once for all tests."""
    return install(tmp_path_factory.mktemp("packaging"))
