"""Sweeps as TOML: read, overridden, written; errors in one line.

Imports neither torch nor Ray, so that a laptop can check and submit a sweep.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from search.sweep.parts import (
    Budget,
    Constraints,
    DataSpec,
    FineTuneSpec,
    GmacsBudget,
    Halving,
    ModelSpec,
    Resources,
    StepSpec,
)
from search.sweep.spec import BUDGETS, Sweep, SweepError


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and apply `key.sub=VALUE` overrides, whose values are TOML; later ones win.

    Raises:
        SweepError: For the first error of the file, in one line.
    """
    if not path.is_file():
        raise SweepError(
            f"sweep {path} does not exist; give a TOML file like search/sweeps/sample.toml"
        )
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SweepError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise SweepError(f"{path}: {_one_line(error)}") from error


def sweep_toml(sweep: Sweep) -> str:
    """Return a sweep as TOML that `load_sweep` reads as an equal sweep."""
    import tomli_w  # who only submits sweeps writes none

    values = sweep.model_dump(exclude_none=True, mode="json")
    for key in ("budget", "budget_gmacs"):
        if (budget := values.get(key)) is not None:
            values[key] = [budget["low"], budget["high"]]
    for step in values["steps"]:
        step |= step.pop("options")
    return tomli_w.dumps(values)


def check_files(sweep: Sweep) -> None:
    """Check that local files exist; URIs (`s3://`) are left to the trials' machine.

    Raises:
        SweepError: For the first that does not.
    """
    named = {"model.path": sweep.model.path}
    named |= {f"data.{split}": getattr(sweep.data, split) for split in ("train", "val", "test")}
    for key, value in named.items():
        if value is None or "://" in value or Path(value).exists():
            continue
        if any(character in value for character in "*?[") and any(Path().glob(value)):
            continue
        raise SweepError(
            f"{key} is {value!r}, which does not exist; give a file, glob or directory"
        )


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    dotted, shown = dotted.strip(), _short(text)[1:-1]
    keys = dotted.split(".")
    if not equals or not all(re.fullmatch("[A-Za-z0-9_-]+", key) for key in keys):
        raise SweepError(f"--set {override!r} is no setting; give KEY=VALUE, for example trials=8")
    try:
        value = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SweepError(
            f"--set {dotted} is {shown}, which is no TOML value; a string needs quotes: "
            f"'{dotted}=\"{shown}\"'"
        ) from error
    if len(value) > 1:
        raise SweepError(
            f"--set {dotted} is {shown}, which is more than a value; give each a --set"
        )
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise SweepError(f"--set {override!r}: {key} is no table; override {key} as a whole")
    if dotted in BUDGETS:  # a budget takes the place of the file's, however that is given
        for key in BUDGETS:
            values.pop(key, None)
    table[keys[-1]] = value["value"]


def _one_line(error: ValidationError) -> str:
    problems = error.errors()
    places = [problem["loc"] for problem in problems]
    problems = [  # an error of a whole that follows from one of its parts says nothing
        problem
        for problem in problems
        if not any(p[: len(problem["loc"])] == problem["loc"] != p for p in places)
    ]
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problem_line(first, lambda: _fields_at(first["loc"][:-1])) + more


def problem_line(problem: Mapping[str, Any], fields: Callable[[], list[str]]) -> str:
    """Return pydantic's error as a line; for an unknown key, with the `fields` that there are."""
    where = ".".join(str(part) for part in problem["loc"]) or "the sweep"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = fields()
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{where} is an unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing; give it a value"
    if problem["type"] == "value_error":
        return f"{where} {message}"
    return f"{where} is {_short(problem['input'])}; {message[0].lower()}{message[1:]}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: Any = Sweep
    for part in location:
        if isinstance(part, str):
            model = {
                "model": ModelSpec,
                "data": DataSpec,
                "budget": Budget,
                "budget_gmacs": GmacsBudget,
                "finetune": FineTuneSpec,
                "halving": Halving,
                "constraints": Constraints,
                "resources": Resources,
                "steps": StepSpec,
            }[part]
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
