"""Constraints beside the budget: what a model may hold, how fast it must be, what it may lose."""

from __future__ import annotations

from search.sweep.parts import Constraints


def violations(
    constraints: Constraints,
    *,
    params: float | None,
    images_per_s: float | None,
    drop: float | None,
) -> dict[str, float]:
    """Return constraint -> by how much it is violated, 0 or less where it holds.

    In units of what it bounds. A constraint whose figure is not known (None) is left out.
    """
    found: dict[str, float] = {}
    if constraints.max_params is not None and params is not None:
        found["max_params"] = params - constraints.max_params
    if constraints.min_images_per_s is not None and images_per_s is not None:
        found["min_images_per_s"] = constraints.min_images_per_s - images_per_s
    if constraints.max_drop is not None and drop is not None:
        found["max_drop"] = drop - constraints.max_drop
    return found


def violated(constraints: Constraints, **figures: float | None) -> str:
    """Say which constraints do not hold, with figure and bound; nothing if all hold."""
    known = {"max_params": "params", "min_images_per_s": "images_per_s", "max_drop": "drop"}
    beyond = violations(constraints, **figures)
    return ", ".join(
        f"{known[name]} {figures[known[name]]:.4g} beyond {name} = {getattr(constraints, name):g}"
        for name, excess in beyond.items()
        if excess > 0.0
    )
