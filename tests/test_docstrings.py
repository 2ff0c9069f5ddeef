"""Shapes stand where tensors pass, and errors are announced where they are raised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "pruners").rglob("*.py"))
assert SOURCES

Function = ast.FunctionDef | ast.AsyncFunctionDef

SHAPE = re.compile(r"\[[^\[\]]*\]")
"""`[B, N, D]`, `[..., n]`, or `[]` of a scalar."""


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def public_functions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """Yield the public functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Function) and is_public(node.name):
            yield None, node
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            for member in node.body:
                if isinstance(member, Function) and is_public(member.name):
                    yield node, member


def has_a_tensor(function: Function) -> bool:
    """Whether a `Tensor` stands in the signature, alone or inside of another type."""
    arguments = function.args
    found = [each.annotation for each in (*arguments.args, *arguments.kwonlyargs)]
    found += [function.returns, *(a.annotation for a in (arguments.vararg, arguments.kwarg) if a)]
    names = (node for each in found if each is not None for node in ast.walk(each))
    return any(isinstance(node, ast.Name) and node.id == "Tensor" for node in names)


def names_a_shape(owner: ast.ClassDef | None, function: Function) -> bool:
    """Whether the docstring, or the attributes of the class's, give a shape."""
    text = ast.get_docstring(function) or ""
    attributes = (ast.get_docstring(owner) or "").partition("Attributes:")[2] if owner else ""
    return bool(SHAPE.search(text) or SHAPE.search(attributes))


def raised(function: Function) -> set[str]:
    """Return the built-in errors, but for an AssertionError, that the body itself raises."""
    errors = set()
    inner = {
        id(node)
        for each in ast.walk(function)
        if isinstance(each, Function | ast.Lambda | ast.ClassDef) and each is not function
        for node in ast.walk(each)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None and id(node) not in inner:
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(call, ast.Name) and call.id.endswith("Error"):
                errors.add(call.id)
    return errors - {"AssertionError"}


def lacks(source: str) -> list[str]:
    """Return what the docstrings of a source lack: `name: shape` or `name: Raises SomeError`."""
    found = []
    for owner, function in public_functions(ast.parse(source)):
        name = f"{owner.name}.{function.name}" if owner else function.name
        text = ast.get_docstring(function) or ""
        if has_a_tensor(function) and not names_a_shape(owner, function):
            found.append(f"{name}: shape")
        announced = text.partition("Raises:")[2]
        found += [f"{name}: Raises {e}" for e in sorted(raised(function)) if e not in announced]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_and_errors_are_written_down(path: Path) -> None:
    assert lacks(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(x: Tensor) -> None:\n    """Do."""', ["f: shape"]),
        ('def f(x: list[Tensor | None]) -> None:\n    """Do."""', ["f: shape"]),
        ('def f() -> dict[str, Tensor]:\n    """Do."""', ["f: shape"]),
        ('def f(*, x: Tensor) -> Tensor:\n    """Do x [B, N]."""', []),
        ('def f(x: Tensor) -> Tensor:\n    """Return a mean []."""', []),
        ("def _f(x: Tensor) -> Tensor: ...", []),
        ('class A:\n    """A."""\n    def f(self, x: Tensor) -> None: ...', ["A.f: shape"]),
        (
            'class A:\n    """A.\n\n    Attributes:\n        x: [B].\n    """\n'
            "    def f(self) -> Tensor: ...",
            [],
        ),
        ('def f():\n    """Do."""\n    raise ValueError("x")', ["f: Raises ValueError"]),
        ('def f():\n    """Raise a ValueError."""\n    raise ValueError', ["f: Raises ValueError"]),
        ('def f():\n    """Do."""\n    def g():\n        raise ValueError', []),
        ('def f():\n    """Do."""\n    raise AssertionError("a bug of ours")', []),
    ],
)
def test_the_checker_can_fail(source: str, expected: list[str]) -> None:
    assert lacks(source) == expected
