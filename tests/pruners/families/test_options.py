from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pytest

from pruners import load_method, method_names
from pruners.families.options import LARGEST_SEED, bounds_of, check_options, option, option_types


@dataclass(frozen=True, kw_only=True)
class Some:
    """Options of kinds that no method has yet."""

    rate: float | None = option(None, above=0.0)
    sizes: tuple[int, ...] = option((1,), low=1, high=9)
    pair: tuple[float, float] = option((0.0, 1.0), low=0.0)
    way: Literal["a", "b", "c"] = "a"


@dataclass(frozen=True, kw_only=True)
class Other(Some):
    """The same with another default."""

    sizes: tuple[int, ...] = (2,)


def wrong_values(kind: Any, method: type, name: str) -> list[object]:
    """Return values that an option of this type and these bounds must refuse."""
    if get_origin(kind) is Literal:
        return ["no such word", 1, None, True]
    if get_origin(kind) is tuple:
        member, second = get_args(kind)
        size = 1 if second is ... else 2
        inner = [(value,) * size for value in wrong_values(member, method, name)]
        return ["cat", 1.0, None, *inner]
    if kind is bool:
        return ["false", 0, 1.0, None, ()]
    if kind is str:
        return [1, None, True, ("taylor",)]
    bounds = bounds_of(method, name)
    out = [-math.inf, math.nan, math.inf, "1", None, True, (1,)]
    out += [2.5] if kind is int else [10**400]
    out += [bounds.low - 1] if bounds.low is not None else []
    out += [bounds.high + 1] if bounds.high is not None else []
    return out + [edge for edge in (bounds.above, bounds.below) if edge is not None]


@pytest.mark.parametrize("name", method_names())
def test_every_option_refuses_what_it_cannot_be_by_name(name: str) -> None:
    method = type(load_method(name))
    for key, kind in option_types(method).items():
        for value in wrong_values(kind, method, key):
            with pytest.raises(ValueError, match=rf"\Aoption {key} of {name} is .*; give .*\Z"):
                load_method(name, **{key: value})


@pytest.mark.parametrize("name", method_names())
def test_every_number_has_bounds(name: str) -> None:
    method = type(load_method(name))
    for key, kind in option_types(method).items():
        if {kind, *get_args(kind)} & {int, float}:
            assert bounds_of(method, key).describe(key), key


@pytest.mark.parametrize(
    ("name", "key", "value", "right"),
    [
        ("vit_slim", "keep_weights", "false", "is 'false'; give true or false"),
        ("uvc", "epochs", 2.5, "is 2.5; give a whole number, at least 1"),
        ("x_pruner", "newton", -1, "is -1; give a number, at least 0"),
        ("x_pruner", "smoothness", math.nan, "is nan; give a number, at least 0"),
        ("x_pruner", "classes", ["cat"], r"is \['cat'\]; give a list, each a whole number, at le"),
        ("cait_channels", "ramp", 0.01, "is 0.01; give a number, from 0.05 to 1"),
        ("x_pruner", "budget", 1, "is 1; give a number, 0 < budget < 1"),
        ("obd", "seed", 2**60, f"give a whole number, from 0 to {LARGEST_SEED}"),
    ],
)
def test_the_error_says_what_would_be_right(name: str, key: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=f"^option {key} of {name} .*{right}"):
        load_method(name, **{key: value})


def test_a_whole_number_is_a_number_and_stays_as_it_was_given() -> None:
    assert load_method("vit_slim", travel=4).options()["travel"] == 4
    assert load_method("vit_slim", travel=4) == load_method("vit_slim", travel=4.0)
    assert load_method("x_pruner", classes=[3, 1]).options()["classes"] == (3, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"rate": 0.5}, {"sizes": ()}, {"sizes": (1, 9)}, {"pair": (0, 3.5)}, {"way": "c"}],
)
@pytest.mark.parametrize("kind", [Some, Other])
def test_what_fits_is_accepted(kind: type, options: dict[str, Any]) -> None:
    chosen = kind(**options)
    check_options("some", chosen)
    assert all(getattr(chosen, key) == value for key, value in options.items())


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"rate": 0.0}, "option rate of some is 0.0; give a number, more than 0 or nothing"),
        ({"sizes": (1, 10)}, r"sizes of some is \[1, 10\]; .*from 1 to 9"),
        ({"sizes": [1]}, "sizes of some is .*; give a list, each a whole number"),
        ({"pair": (0.0,)}, "pair of some .*a list of 2, each a number, at least 0"),
        ({"way": "d"}, r"give one of \['a', 'b', 'c'\]"),
    ],
)
@pytest.mark.parametrize("kind", [Some, Other])  # a new default keeps the bounds
def test_what_does_not_fit_is_refused(kind: type, options: dict[str, Any], right: str) -> None:
    with pytest.raises(ValueError, match=right):
        check_options("some", kind(**options))
