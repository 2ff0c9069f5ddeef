"""What people read, in parts: pages, their blocks of code, what they name, their headings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]

FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The page that it stands on.
        line: The line of its fence.
        language: What stands behind the fence.
        text: What is in it.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose_of(page: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def blocks(language: str, pages: list[str] = PAGES) -> list[Block]:
    """Return all fenced blocks of a language; "" are commands and what they print."""
    return [
        Block(page, text_of(page)[: found.start()].count("\n") + 1, found[1], found[2])
        for page in pages
        for found in FENCE.finditer(text_of(page))
        if found[1] == language
    ]


def lines_of(block: Block) -> list[str]:
    """Return the lines of a block, with those that end with a backslash joined."""
    return block.text.replace("\\\n", " ").splitlines()


def spans(page: str) -> list[str]:
    """Return what stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, which GitHub and the site make alike."""
    found = re.findall(r"(?m)^#+ (.+)$", prose_of(page))
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found
    }


def links(page: str) -> list[str]:
    """Return where the links and pictures of a page lead that lead to no other host."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose_of(page)))
    found += re.findall(r"\[`[^`\n]+`\]\(([^)\s]+)\)", prose_of(page))
    return [link for link in found if "://" not in link]


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return what a source defines or imports, with `Class.method` for what is in a class."""
    return frozenset(_names(ast.parse(path.read_text()).body, ""))


def _names(body: list[ast.stmt], within: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield within + node.name
        elif isinstance(node, ast.ClassDef):
            yield within + node.name
            yield from _names(node.body, f"{within}{node.name}.")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (within + (alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (within + name.id for name in targets if isinstance(name, ast.Name))


def resolves(dotted: str) -> bool:
    """Whether a dotted name of this project's packages is a module, or defined in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:count])
        for source in (folder.with_suffix(".py"), folder / "__init__.py"):
            if source.exists():
                rest = ".".join(parts[count:])
                return not rest or rest in names_in(source)
    return False
