"""What follows from the code is what the code says now."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from search.sweep.parts import METHODS
from tests.docs.pages import ROOT, text_of

AGAIN = "run `python docs/generate.py`"


@pytest.fixture(scope="module")
def generate() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_the_pages_are_up_to_date(generate: dict[str, Any]) -> None:
    pages: dict[Path, str] = generate["pages"]()
    for path, text in pages.items():
        assert path.read_text() == text, AGAIN


def test_every_key_of_a_sweep_has_a_row(generate: dict[str, Any]) -> None:
    """A row with a type, a default and a meaning."""
    page = text_of("docs/sweep-keys.md")
    for heading, model in {"Top level": generate["spec"].Sweep, **generate["PARTS"]}.items():
        title = {"Top level": heading, "steps": "`[[steps]]`"}.get(heading, f"`[{heading}]`")
        section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"(?m)^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", section)
        assert [row[0] for row in rows] == [k for k in model.model_fields if k != "options"]


def test_bounds_and_defaults_are_those_of_the_model() -> None:
    page = text_of("docs/sweep-keys.md")
    assert "| `trials` | integer, >= 2 | required |" in page
    assert "| `std` | list of number, > 0 | none |" in page
    assert "| `warmup` | number, >= 0, < 1 | `0.1` |" in page
    assert '| `sampler` | `"auto"`, `"gp"`, ' in page


def test_bounds_of_options_are_those_of_the_methods() -> None:
    section = text_of("docs/method-options.md").partition("\n## x_pruner\n")[2]
    assert "| `budget` | number, > 0, < 1 | `0.5` |" in section
    assert "| `mask_epochs` | integer, >= 1 | `2` |" in section
    assert "| `classes` | list of integer, >= 0 | `[]` |" in section


def test_the_map_names_the_folders_that_exist(generate: dict[str, Any]) -> None:
    folders = {
        str(path.parent.relative_to(ROOT))
        for package in ("pruners", "search", "cluster")
        for path in (ROOT / package).rglob("*.py")
    }
    mapped = {folder for folder, _ in generate["folders"]()}
    assert mapped == folders - {"search/sample"}
    page = text_of("docs/how-it-works.md")
    assert all(f"| `{folder}/` | {line} |" in page for folder, line in generate["folders"]())
    assert all(line.endswith(".") for _, line in generate["folders"]())
    assert METHODS.is_dir()
