from __future__ import annotations

from pathlib import Path

import pytest

from search.sweep.tracking_uri import artifacts_beside


def test_artifacts_lie_beside_a_sqlite_file(tmp_path: Path) -> None:
    assert artifacts_beside(f"sqlite:///{tmp_path}/a.db") == (tmp_path / "mlartifacts").as_uri()


def test_a_relative_file_is_that_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert artifacts_beside("sqlite:///of/a.db") == (tmp_path / "of" / "mlartifacts").as_uri()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "postgresql://host/mlflow"])
def test_others_know_themselves(uri: str) -> None:
    assert artifacts_beside(uri) is None
