"""The arrows between the packages: `cluster -> search -> pruners -> torch, timm`, and no others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "pruners": {"search", "cluster", "ray", "optuna", "mlflow", "pyarrow", "pydantic", "rich"},
    "search": {"cluster"},
    "cluster": {"torch", "timm", "pruners"},
    "search/sweep.py": {"torch", "timm", "ray", "pruners", "optuna", "mlflow"},
    "search/results.py": {"torch", "ray", "mlflow"},
    "search/progress.py": {"torch", "ray", "mlflow"},
    "search/pareto.py": {"torch", "ray", "mlflow"},
}


def imported(source: str) -> set[str]:
    """Top-level packages that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            raise ValueError("relative imports hide the arrow; import from the package")
    return names


def wrong_arrows(path: str, source: str) -> set[str]:
    found = imported(source)
    wrong: set[str] = set()
    for place, forbidden in FORBIDDEN.items():
        if path == place or path.startswith(f"{place}/"):
            wrong |= found & forbidden
    return wrong


def sources() -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for package in ("pruners", "search", "cluster")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


@pytest.mark.parametrize("path", sources())
def test_no_other_arrow(path: str) -> None:
    assert wrong_arrows(path, (ROOT / path).read_text()) == set()


def test_every_file_named_above_exists() -> None:
    assert [place for place in FORBIDDEN if not (ROOT / place).exists()] == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("pruners/methods/x.py", "import ray.tune as t", {"ray"}),
        ("pruners/x.py", "def f():\n    from search.sweep import Sweep", {"search"}),
        ("search/x.py", "if True:\n    import cluster", {"cluster"}),
        ("search/sweep.py", "from pruners import Plan", {"pruners"}),
        ("cluster/x.py", "import os, torch", {"torch"}),
        ("cluster/x.py", "from search import sweep", set()),
        ("search/x.py", "import torch\nimport researching", set()),
    ],
)
def test_the_checker_can_fail(path: str, source: str, wrong: set[str]) -> None:
    assert wrong_arrows(path, source) == wrong


def test_relative_imports_are_refused() -> None:
    with pytest.raises(ValueError, match="relative imports"):
        imported("from . import sweep")
