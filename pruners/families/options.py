"""Options of methods: types and bounds are declared with the field, and checked at the door."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_SEED = 2**53
"""Seeds are multiplied with primes, and have to stay below PyTorch's limit."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    types.NoneType: "nothing",
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a number must lie within; None is no bound.

    Attributes:
        low: The least that is allowed.
        high: The most that is allowed.
        above: What it must be more than.
        below: What it must be less than.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, number: float) -> bool:
        """Whether a number lies within."""
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def describe(self, name: str) -> str:
        """Say the bounds of a number of that name; empty if there are none."""
        if self.above is not None and self.below is not None:
            return f"{self.above:g} < {name} < {self.below:g}"
        if self.low is not None and self.high is not None:
            return f"from {self.low:.16g} to {self.high:.16g}"
        words = {"at least": self.low, "at most": self.high}
        words |= {"more than": self.above, "less than": self.below}
        return ", ".join(f"{word} {x:g}" for word, x in words.items() if x is not None)


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field with bounds; those of a tuple hold for each of its members.

    A subclass that gives the field another default keeps the bounds.
    """
    bounds = Bounds(low=low, high=high, above=above, below=below)
    return field(default=default, metadata={"bounds": bounds})


def bounds_of(method: type, name: str) -> Bounds:
    """Return the bounds of an option of a method."""
    for cls in method.__mro__:
        own = vars(cls).get("__dataclass_fields__", {})
        if name in own and "bounds" in own[name].metadata:
            bounds: Bounds = own[name].metadata["bounds"]
            return bounds
    return Bounds()


@cache
def option_types(method: type) -> dict[str, Any]:
    """Return the options of a method, a dataclass, with their types."""
    hints = get_type_hints(method)
    return {each.name: hints[each.name] for each in fields(method)}


def check_options(name: str, method: object) -> None:
    """Check all options of a method by their types and bounds.

    Raises:
        ValueError: That names the option, its value and what would be right.
    """
    cls: type = type(method)
    for key, kind in option_types(cls).items():
        value, bounds = getattr(method, key), bounds_of(cls, key)
        if not _fits(value, kind, bounds):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"option {key} of {name} is {shown!r}; give {_right(key, kind, bounds)}"
            )


def _fits(value: object, kind: Any, bounds: Bounds) -> bool:
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(member) and value == member for member in members)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member, bounds) for member in members)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if members[-1] is Ellipsis:
            members = members[:1] * len(value)
        return len(value) == len(members) and all(map(_fits, value, members, [bounds] * len(value)))
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float)):
        return _is_finite(value) and bounds.hold(value)
    if kind is int and not isinstance(value, bool) and isinstance(value, int):
        return bounds.hold(value)
    return kind not in (int, float) and isinstance(value, kind)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float holds
        return False


def _right(name: str, kind: Any, bounds: Bounds) -> str:
    """Say what would be right."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, members)) if len(members) < 3 else f"one of {list(members)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_right(name, member, bounds) for member in members)
    if origin is tuple:
        size = "" if members[-1] is Ellipsis else f" of {len(members)}"
        return f"a list{size}, each {_right(name, members[0], bounds)}"
    said = bounds.describe(name) if kind in (int, float) else ""
    return f"{_WORDS[kind]}, {said}" if said else _WORDS[kind]
