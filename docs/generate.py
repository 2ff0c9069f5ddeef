"""Writes what the pages say that the code knows better: `python docs/generate.py`.

Three texts follow from the code: the keys of a sweep's TOML (from its pydantic model), the options
of the methods (from their dataclasses), and the map of the folders (from their docstrings).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from search.sweep import parts, spec

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

BY_HAND = "<!-- Written by `python docs/generate.py`; do not edit. -->"

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

PARTS = {
    "model": parts.ModelSpec,
    "data": parts.DataSpec,
    "steps": parts.StepSpec,
    "finetune": parts.FineTuneSpec,
    "halving": parts.Halving,
    "constraints": parts.Constraints,
    "resources": parts.Resources,
}
"""Key of a sweep -> what the table of that name holds, in the order of the page."""

BUDGETS = {
    "budget": "`[low, high]`, 0 < low < high <= 1",
    "budget_gmacs": "`[low, high]`, 0 < low < high",
    "budget_of": "string, or list of 2 strings",
}
"""Key of a budget -> its type."""


def sweep_keys() -> str:
    """Return the page on the keys of a sweep's TOML."""
    lines = [
        "# Every key of a sweep",
        "",
        BY_HAND,
        "",
        "A sweep is a TOML file; `search/sweeps/sample.toml` is one with each line explained.",
        "An unknown key, a value of the wrong type and a value out of range are refused in one",
        "line that names the key. `--set KEY=VALUE` overrides any key for one run: values are",
        "TOML, keys of a table are dotted (`--set trials=40 data.batch_size=32 'name=\"mine\"'`).",
        "",
        "What is required must be given; all else may be left out.",
        "",
        "## Top level",
        "",
        *_table_of_fields(spec.Sweep),
    ]
    for key, part in PARTS.items():
        heading = "`[[steps]]`" if key == "steps" else f"`[{key}]`"
        lines += ["", f"## {heading}", "", _summary(part), "", *_table_of_fields(part)]
        if key == "steps":
            lines += [
                "",
                "The method's own options stand beside these keys:"
                " see [Options of the methods](method-options.md).",
            ]
    return "\n".join(lines) + "\n"


def method_options() -> str:
    """Return the page on the options of all methods."""
    from pruners import method_names  # imports torch
    from pruners.families.options import bounds_of, option_types

    lines = [
        "# Options of the methods",
        "",
        BY_HAND,
        "",
        "In a sweep a method's options stand beside `method` in `[[steps]]`; in Python they are",
        'the keywords of `load_method("cap", block=128)`. Which method does what:',
        "[The methods](methods.md).",
    ]
    for name in method_names():
        method = _method_class(name)
        lines += ["", f"## {name}", "", _summary(method), ""]
        if not dataclasses.fields(method):
            lines += ["It has no options."]
            continue
        told, types_of = _attributes(method), option_types(method)
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(method):
            row = (
                f"`{field.name}`",
                _annotation(types_of[field.name]) + _bounds(bounds_of(method, field.name)),
                _code(_toml(field.default)),
                _cell(told.get(field.name, "")),
            )
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def folders() -> list[tuple[str, str]]:
    """Return each folder of the three packages and the first line of its docstring."""
    found = []
    for package in ("pruners", "search", "cluster"):
        for path in sorted((ROOT / package).rglob("__init__.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            line = docstring.partition("\n\n")[0].replace("\n", " ")
            found.append((str(path.parent.relative_to(ROOT)), line))
    return found


def folder_map() -> str:
    """Return the map of the folders as a table."""
    rows = [f"| `{folder}/` | {line} |" for folder, line in folders()]
    return "\n".join(["| folder | what is in it |", "|---|---|", *rows]) + "\n"


def with_folder_map(page: str) -> str:
    """Return a page with the map between its two marks as it is now."""
    begin, end = "<!-- folders: generated -->\n", "<!-- end of folders -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no {begin.strip()} and {end}")
    return f"{before}{begin}\n{folder_map()}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Return each page that is written here, as it should be."""
    how = DOCS / "how-it-works.md"
    return {
        DOCS / "sweep-keys.md": sweep_keys(),
        DOCS / "method-options.md": method_options(),
        how: with_folder_map(how.read_text()),
    }


def _table_of_fields(model: type[BaseModel]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if model is parts.StepSpec and key == "options":
            continue
        told = _cell(field.description or "")
        row = (f"`{key}`", _type_of(key, field), _default_of(key, field), told)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _type_of(key: str, field: FieldInfo) -> str:
    if key in PARTS:
        table = "array of tables" if key == "steps" else "table"
        name = "steps" if key == "steps" else key
        return f"[{table}](#{name})"
    if key in BUDGETS:
        return BUDGETS[key]
    return _annotation(field.annotation) + _constraints(field.metadata)


def _annotation(annotation: Any) -> str:
    """Say a type in TOML's words, bounds included."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        metadata = [part for item in args[1:] for part in getattr(item, "metadata", None) or [item]]
        return _annotation(args[0]) + _constraints(metadata)
    if origin is typing.Literal:
        return ", ".join(_code(_toml(value)) for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_annotation(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)}, each "
        return f"list of {count}{_annotation(args[0])}"
    if origin is dict:
        return "table"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[annotation]


def _constraints(metadata: list[Any]) -> str:
    parts = []
    for item in metadata:
        parts += [f"{sign} {getattr(item, name):g}" for name, sign in _bounds_of(item)]
        if pattern := getattr(item, "pattern", None):
            parts.append("letters, digits, `_`, `.`, `-`" if "A-Za-z0-9" in pattern else pattern)
    return "".join(f", {part}" for part in parts)


def _bounds_of(item: Any) -> Iterator[tuple[str, str]]:
    return ((name, sign) for name, sign in SIGNS.items() if getattr(item, name, None) is not None)


def _default_of(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if key in PARTS:
        return "`false`" if key == "halving" else "its own"
    return _code(_toml(field.default)) or "none"


def _toml(value: Any) -> str:
    if value is None or value is PydanticUndefined or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    return "{}" if value == {} else f"{value}"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _summary(described: type) -> str:
    return (inspect.getdoc(described) or "").partition("\n\n")[0].replace("\n", " ")


def _method_class(name: str) -> type:
    from pruners import load_method

    return type(load_method(name))


def _bounds(bounds: Any) -> str:
    """Say the bounds of an option, a `pruners.families.options.Bounds`."""
    signs = {">=": bounds.low, ">": bounds.above, "<=": bounds.high, "<": bounds.below}
    return "".join(f", {sign} {x:.16g}" for sign, x in signs.items() if x is not None)


def _attributes(method: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of their attributes."""
    told: dict[str, str] = {}
    for ancestor in method.__mro__:
        _, _, section = (inspect.cleandoc(ancestor.__doc__ or "")).partition("Attributes:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        for name, text in re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w+: |\Z)", section):
            told.setdefault(name, text)
    return told


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
