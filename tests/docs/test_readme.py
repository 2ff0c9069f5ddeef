"""README.md is one page, and what a reader copies from it stands on the pages too."""

from __future__ import annotations

import re

import pytest

from search.sweep.parts import METHODS
from tests.docs.pages import FENCE, PAGES, text_of

README = text_of("README.md")
LINES = README.splitlines()


def test_it_is_one_page() -> None:
    assert len(LINES) <= 250
    assert [line for line in LINES if len(line) > 100] == []


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/method-options.md"])
def test_every_method_is_told_of(page: str) -> None:
    names = {path.stem for path in METHODS.glob("*.py") if path.stem != "__init__"}
    told = re.findall(r"(?m)^(?:\| `|## )([a-z_]+)", text_of(page))
    assert names <= set(told)


def test_the_methods_of_both_tables_are_of_the_same_families() -> None:
    rows = [
        re.findall(r"(?m)^\| `(\w+)` \| (unit|token|weight) \|", text_of(page))
        for page in ("README.md", "docs/methods.md")
    ]
    assert rows[0] == rows[1]


def test_what_its_journeys_say_is_what_the_pages_say() -> None:
    """So what runs the pages' commands and code, like the browser tests, runs README's too."""
    journeys = README.partition("## Three journeys")[2].partition("\n## ")[0]
    rest = "\n".join(text_of(page) for page in PAGES if page.startswith("docs/"))
    found = FENCE.findall(journeys)
    assert len(found) >= 6
    for language, text in found:
        if language != "toml":  # shorter there
            assert f"```{language}\n{text}" in rest or text in rest, text
