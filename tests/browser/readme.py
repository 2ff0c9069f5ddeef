"""README.md's commands and lines of code, as a reader copies them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def blocks(heading: str, language: str = "") -> list[str]:
    """Return the code blocks of a section, in their order.

    Args:
        heading: Its heading, or how that begins.
        language: What stands behind the block's fence: "python", or nothing.
    """
    section = re.split(r"(?m)^#+ ", README.read_text())
    (text,) = (part for part in section if part.startswith(heading))
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
