"""A sweep as TOML: what it was run with, beside its results."""

from __future__ import annotations

import tomli_w

from search.sweep import Sweep


def sweep_toml(sweep: Sweep) -> str:
    """Return a sweep as TOML that `load_sweep` reads as an equal sweep."""
    values = sweep.model_dump(exclude_none=True, mode="json")
    values["budget"] = [sweep.budget.low, sweep.budget.high]
    for step in values["steps"]:
        step |= step.pop("options")
    return tomli_w.dumps(values)
