"""The tests lie as the sources do, and take what they share from files that are no tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.processes import ROOT

TESTS = ROOT / "tests"
FILES = [str(path.relative_to(TESTS)) for path in sorted(TESTS.rglob("*.py"))]
MIRRORING = [
    file
    for file in FILES
    if file.split("/")[0] in ("pruners", "search", "cluster") and "/test_" in file
]


def mirrors(file: str, root: Path = ROOT) -> bool:
    """Whether `folder/test_x.py` or `folder/test_x_more.py` has a source `folder/x`.

    Or a folder of data beside it, which says that it is about what lies there.
    """
    folder, _, name = file.rpartition("/")
    words = name.removesuffix(".py").split("_")[1:]
    names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    return (root / "tests" / folder / "_".join(words)).is_dir() or any(
        (root / folder / source).exists()
        for name in names
        for source in (f"{name}.py", f"__{name}__.py", name)
    )


def libraries(source: str) -> set[str]:
    """Return the files of tests that a source imports, though pytest runs them or loads them."""
    names = {
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    parts = {part for name in names if name.split(".")[0] == "tests" for part in name.split(".")}
    return {part for part in parts if part.startswith("test_") or part == "conftest"}


@pytest.mark.parametrize("file", MIRRORING)
def test_a_test_stands_where_its_source_does(file: str) -> None:
    assert mirrors(file)


@pytest.mark.parametrize("file", FILES)
def test_no_test_is_a_library(file: str) -> None:
    assert libraries((TESTS / file).read_text()) == set()


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("search/test_main.py", True),
        ("search/records/test_front.py", True),
        ("search/records/test_front_of_many.py", True),
        ("cluster/test_deploy_ray.py", True),  # a folder
        ("search/test_kept_sweeps.py", True),
        ("search/test_front.py", False),
        ("search/records/test_frontier.py", False),
    ],
)
def test_the_mirror_can_fail(file: str, holds: bool) -> None:
    assert mirrors(file) == holds


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.search.records.test_files import record", {"test_files"}),
        ("def f():\n    from tests.search.records import test_files", {"test_files"}),
        ("import tests.conftest", {"conftest"}),
        ("from tests.models import test_images, TINY", {"test_images"}),
        ("from tests.models import TINY\nfrom torch.testing import test_x", set()),
    ],
)
def test_the_search_for_libraries_can_fail(source: str, found: set[str]) -> None:
    assert libraries(source) == found
