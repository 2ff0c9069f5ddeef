"""Blocks of code on pages: Python compiles, TOML is a sweep's, commands parse."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cluster.__main__ import main as cluster
from search.__main__ import main as search
from search.sweep import Sweep
from tests.docs.pages import PAGES, ROOT, Block, blocks, lines_of, resolves, spans

PYTHON = blocks("python")
TOML = blocks("toml")
SAMPLE = ROOT / "search" / "sweeps" / "sample.toml"
OWN = ("pruners", "search", "cluster")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def imports(code: str) -> set[str]:
    """Return the dotted names that code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_what_python_imports_exists(block: Block) -> None:
    for name in imports(block.text):
        top = name.partition(".")[0]
        found = resolves(name) if top in OWN else importlib.util.find_spec(top) is not None
        assert found, name


def merged(values: dict[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep with some of its settings replaced, as `--set` does."""
    out = dict(into)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(value, out[key]) if both else value
    return out


@pytest.mark.parametrize("block", TOML, ids=str)
def test_toml_is_of_a_sweep(block: Block) -> None:
    """A whole sweep is valid; what is a part of one is, put into the sample."""
    values = tomllib.loads(block.text)
    whole = {"name", "model", "data", "steps"} <= set(values)
    Sweep.model_validate(values if whole else merged(values, tomllib.loads(SAMPLE.read_text())))


def test_toml_that_is_none_is_found() -> None:
    with pytest.raises(ValueError, match="magnitud"):
        test_toml_is_of_a_sweep(Block("x.md", 1, "toml", '[[steps]]\nmethod = "magnitud"'))
    with pytest.raises(ValueError, match="trails"):
        test_toml_is_of_a_sweep(Block("x.md", 1, "toml", "trails = 3"))


PROGRAM = re.compile(r"(python -m (?:search|cluster)|prunefront) ")


def commands() -> list[tuple[str, str]]:
    """Return each command of this project in a block, also behind what a program prints."""
    return [
        (str(block), line[found.start() :])
        for block in blocks("")
        for line in lines_of(block)
        if (found := PROGRAM.search(line))
    ]


class Asked(Exception):  # noqa: N818
    """Carries the parser that was asked to parse."""


@cache
def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Return the parser of a command line, as the command line makes it."""

    def ask(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Asked(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", ask), pytest.raises(Asked) as asked:
        main([])
    (parser,) = asked.value.args
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def verbs(main: Callable[[list[str]], int]) -> set[str]:
    actions = parser_of(main)._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return set(choices)


MAINS = {"search": search, "cluster": cluster}


def arguments(command: str) -> tuple[str, list[str]]:
    """Return the package that a command runs, and its arguments."""
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        return words[2], words[3:]
    return ("search" if words[1] in verbs(search) else "cluster"), words[1:]


@pytest.mark.parametrize(("place", "command"), commands())
def test_commands_parse(place: str, command: str) -> None:
    package, words = arguments(command)
    try:
        parser_of(MAINS[package]).parse_args(words)
    except SystemExit as error:  # argparse has printed why
        raise AssertionError(f"{place}: {command}") from error


def test_there_are_commands_to_check() -> None:
    found = {tuple(arguments(command)[1][:1]) for _, command in commands()}
    assert found >= {(verb,) for verb in ("run", "promote", "export", "report", "submit", "due")}


@pytest.mark.parametrize("page", PAGES)
def test_verbs_in_sentences_exist(page: str) -> None:
    for span in spans(page):
        if match := re.match(r"(?:python -m (search|cluster)|prunefront) (\w+)", span):
            mains = [MAINS[match[1]]] if match[1] else [search, cluster]
            assert any(match[2] in verbs(main) for main in mains), span


def with_siblings(script: Path) -> str:
    """Return a benchmark's source, and those of the benchmarks that it imports."""
    source = script.read_text()
    modules = {name.partition(".")[0] for name in imports(source)}
    beside = [script.with_name(f"{module}.py") for module in sorted(modules)]
    return "".join([source, *(path.read_text() for path in beside if path.exists())])


@pytest.mark.parametrize("page", PAGES)
def test_benchmarks_take_the_options_that_pages_give_them(page: str) -> None:
    code = [*spans(page), *(line for block in blocks("", [page]) for line in lines_of(block))]
    for command in code:
        if match := re.match(r"python (tests/benchmarks/\w+\.py)(.*)", command):
            source = with_siblings(ROOT / match[1])
            for option in re.findall(r"--[\w-]+", match[2]):
                assert f'"{option}"' in source, command
