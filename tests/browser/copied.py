"""Commands and lines of code on pages, as a reader copies them.

`tests/docs/test_readme.py` says that those in README.md's journeys are the same.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "use-a-model.md"
"""What follows the review of a sweep."""


def blocks(heading: str, language: str = "") -> list[str]:
    """Return the code blocks of a section of the page, in their order.

    Args:
        heading: Its heading.
        language: What stands behind the block's fence: "python", or nothing.
    """
    sections = re.split(r"(?m)^#+ ", PAGE.read_text())
    (text,) = (part for part in sections if part.partition("\n")[0] == heading)
    return [
        code for kind, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if kind == language
    ]


def block(heading: str, begin: str, language: str = "") -> str:
    """Return the one code block of a section in which a line begins so."""
    (found,) = (
        code
        for code in blocks(heading, language)
        if any(line.startswith(begin) for line in code.splitlines())
    )
    return found
