"""Values of files as the types that they should have, or an error of one line."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

JsonObject = dict[str, Any]
"""Values of JSON, by their keys."""

T = TypeVar("T")


def typed(kind: TypeAdapter[T], values: object) -> T:
    """Return values as a type.

    Raises:
        ValueError: For the first that is of another type, missing or unknown, in one line.
    """
    try:
        return kind.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc']}: {first['msg']}") from error
