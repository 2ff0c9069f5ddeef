"""The arrows between packages and between folders: each imports only what stands before it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STOREYS = (
    "pruners/model",
    "pruners/training",
    "pruners/saliency",
    "pruners/latency",
    "pruners/export",
    "pruners/families",
    "pruners",
    "pruners/methods",
    "search/sweep",
    "search/records",
    "search/data",
    "search/space",
    "search/strategy",
    "search/trial",
    "search/report",
    "search/prepare",
    "search/tracking",
    "search",
    "cluster",
)
"""Folders, lowest first. A folder's own files may import each other, and those of lower folders."""

FORBIDDEN = {
    "pruners": {"ray", "optuna", "mlflow", "pyarrow", "pydantic", "rich"},
    "cluster": {"torch", "timm", "pruners"},
    "search/sweep": {"torch", "timm", "ray", "pruners", "optuna", "mlflow"},
    "search/records/files.py": {"torch", "ray", "mlflow"},
    "search/records/pareto.py": {"torch", "ray", "mlflow"},
    "search/report/progress.py": {"torch", "ray", "mlflow"},
}
"""Packages that a place must not import, anywhere in it."""

ALSO = {"cluster/command.py": {"search"}}
"""Files of `cluster` that may import more: `prunefront` starts both programs, each when asked."""


def imported(source: str) -> set[str]:
    """Return the dotted modules, or names of modules, that a source imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise ValueError("relative imports hide the arrow; import from the package")
    return names


def storey_of(path: str) -> str:
    """Return the folder of a file, as `STOREYS` names it."""
    folder = path.rpartition("/")[0]
    return max((s for s in STOREYS if f"{folder}/".startswith(f"{s}/")), key=len)


def folder_of(module: str) -> str | None:
    """Return the folder that holds a module of this project; None for others'."""
    parts = module.split(".")
    if parts[0] not in ("pruners", "search", "cluster"):
        return None
    return "/".join(parts[:2]) if "/".join(parts[:2]) in STOREYS else parts[0]


def wrong_arrows(path: str, source: str) -> set[str]:
    """Return what a file imports from a higher storey, or must not import at all."""
    names = imported(source)
    own = STOREYS.index(storey_of(path))
    folders = {folder for name in names if (folder := folder_of(name)) is not None}
    wrong = {folder for folder in folders if STOREYS.index(folder) > own}
    for place, forbidden in FORBIDDEN.items():
        if path == place or path.startswith(f"{place}/"):
            wrong |= {name.partition(".")[0] for name in names} & forbidden
    if path.startswith("cluster/"):  # it runs where neither torch nor Ray Tune is
        allowed = {"cluster", "search/sweep"} | ALSO.get(path, set())
        wrong |= {folder for folder in folders if folder not in allowed}
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


def test_every_folder_has_a_storey() -> None:
    folders = {path.rpartition("/")[0] for path in sources()} - {"search/sample"}
    assert folders == set(STOREYS)


def test_every_place_named_above_exists() -> None:
    assert [place for place in (*FORBIDDEN, *ALSO) if not (ROOT / place).exists()] == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("pruners/methods/x.py", "import ray.tune as t", {"ray"}),
        ("pruners/x.py", "def f():\n    from search.sweep import Sweep", {"search/sweep"}),
        ("pruners/model/x.py", "from pruners.families.unit import U", {"pruners/families"}),
        ("pruners/model/x.py", "from pruners import Plan", {"pruners"}),
        ("pruners/families/x.py", "from pruners.model.vit import V", set()),
        ("search/x.py", "if True:\n    import cluster", {"cluster"}),
        ("search/records/x.py", "from search.data import images", {"search/data"}),
        ("search/records/x.py", "import search.trial.trial", {"search/trial"}),
        ("search/trial/x.py", "from search.records import front", set()),
        ("search/sweep/x.py", "from pruners import Plan", {"pruners"}),
        ("cluster/x.py", "import os, torch", {"torch"}),
        ("cluster/x.py", "from search.sweep import Sweep", set()),
        ("cluster/x.py", "from search.records import front", {"search/records"}),
        ("cluster/x.py", "from search.__main__ import main", {"search"}),
        ("cluster/command.py", "from search.__main__ import main", set()),
        ("cluster/command.py", "from search.records import front", {"search/records"}),
        ("cluster/command.py", "def f():\n    import torch", {"torch"}),
        ("search/x.py", "import torch\nimport researching", set()),
    ],
)
def test_the_checker_can_fail(path: str, source: str, wrong: set[str]) -> None:
    assert wrong_arrows(path, source) == wrong


def test_the_command_imports_nothing_before_it_knows_the_verb() -> None:
    """Not even `search`, since it says if that is another package."""
    tree = ast.parse((ROOT / "cluster" / "command.py").read_text())
    first = "\n".join(
        ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef)
    )
    assert {name.partition(".")[0] for name in imported(first)} <= sys.stdlib_module_names


def test_relative_imports_are_refused() -> None:
    with pytest.raises(ValueError, match="relative imports"):
        imported("from . import sweep")
