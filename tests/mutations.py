"""Damage for fuzz tests: of bytes, and of JSON or TOML values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Random = np.random.Generator

EDGES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"{", b"[", b"9" * 30, b"\xff" * 8)
"""What parsers stumble over."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**9, -(10**9), 2**31, 2**63, 10**400),
    *(0.0, 0.5, -0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "x", "ü\u2028", "line\nbreak", "\x00", "../../x", "/etc/passwd", "9" * 60, "meta"),
    *([], [[]], [1], [1, 2, 3], ["x"], {}, {"x": 1}, {"": {}}),
)
"""JSON values that stand where others are due."""

DEEP = 3_000
"""Levels of nesting, more than Python recurses."""


def damaged(content: bytes, random: Random) -> bytes:
    """Damage bytes in one to three places."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        _BYTE_DAMAGE[random.integers(len(_BYTE_DAMAGE))](data, random)
    return bytes(data)


def _place(data: bytearray, random: Random) -> int:
    return int(random.integers(len(data) + 1))


def _piece(data: bytearray, random: Random) -> bytes:
    start = _place(data, random)
    return bytes(data[start : start + int(random.geometric(0.1))])


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))


def _set(data: bytearray, random: Random) -> None:
    start, edge = _place(data, random), EDGES[random.integers(len(EDGES))]
    data[start : start + len(edge)] = edge


def _insert(data: bytearray, random: Random) -> None:
    start, edge = _place(data, random), EDGES[random.integers(len(EDGES))]
    data[start:start] = edge


def _delete(data: bytearray, random: Random) -> None:
    start = _place(data, random)
    del data[start : start + int(random.geometric(0.1))]


def _duplicate(data: bytearray, random: Random) -> None:
    start = _place(data, random)
    data[start:start] = _piece(data, random)


def _splice(data: bytearray, random: Random) -> None:
    start, piece = _place(data, random), _piece(data, random)
    data[start : start + len(piece)] = piece


def _truncate(data: bytearray, random: Random) -> None:
    del data[_place(data, random) :]


_BYTE_DAMAGE: tuple[Callable[[bytearray, Random], None], ...] = (
    *(_flip, _flip, _flip, _set, _set, _insert, _delete, _duplicate, _splice, _truncate),
)


def odd_values(values: Any, random: Random) -> Any:
    """Return a copy of JSON values that is wrong in one place, rarely in two or three."""
    whole = copy.deepcopy({"": values})
    for _ in range(int(random.geometric(0.8))):
        if not (places := list(_places(whole))):  # all is gone
            break
        holder, key = places[random.integers(len(places))]
        _VALUE_DAMAGE[random.integers(len(_VALUE_DAMAGE))](holder, key, random)
    return whole.get("")


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of each value."""
    keys = values if isinstance(values, dict) else range(len(values))
    for key in keys:
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from _places(values[key])


def _replace(holder: Any, key: Any, random: Random) -> None:
    holder[key] = copy.deepcopy(ODD[random.integers(len(ODD))])


def _drop(holder: Any, key: Any, random: Random) -> None:
    del holder[key]


def _add(holder: Any, key: Any, random: Random) -> None:
    odd = copy.deepcopy(ODD[random.integers(len(ODD))])
    if isinstance(holder, dict):
        holder[("x", "", "ü", "../x", f"{key}_")[random.integers(5)]] = odd
    else:
        holder.insert(int(random.integers(len(holder) + 1)), odd)


def _scale(holder: Any, key: Any, random: Random) -> None:
    """Change a number to another one of its type, text by a letter, a list by an element."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, (int, float)):
        factor, more = (2, -1, 1000)[random.integers(3)], int(random.integers(2))
        holder[key] = type(value)(value * factor + more)
    elif isinstance(value, str):
        holder[key] = damaged(value.encode(), random).decode(errors="replace")
    elif isinstance(value, list) and value:
        holder[key] = [*value, value[0]]


def _wrap(holder: Any, key: Any, random: Random) -> None:
    holder[key] = [holder[key]] if random.integers(2) else {"x": holder[key]}


_VALUE_DAMAGE: tuple[Callable[[Any, Any, Random], None], ...] = (
    *(_replace, _replace, _replace, _scale, _scale, _drop, _add, _wrap),
)


def damaged_json(values: Any, random: Random) -> bytes:
    """Return JSON that is wrong: in its values mostly, in its bytes, or by its depth."""
    kind = random.random()
    if kind < 0.3:
        return damaged(json.dumps(values).encode(), random)
    text = json.dumps(odd_values(values, random), ensure_ascii=bool(random.integers(2)))
    if kind < 0.302:
        text = "[" * DEEP + text + "]" * DEEP
    return text.encode(errors="replace")
