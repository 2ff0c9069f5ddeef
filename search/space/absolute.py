"""Budgets in absolute cost, or of other models, as shares of the dense model's cost."""

from __future__ import annotations

import torch

from pruners import PrunableViT, ViTShape, cost_of
from search.sweep.parts import Budget
from search.sweep.spec import Sweep, SweepError


def budget_in_shares(sweep: Sweep, dense: ViTShape, dense_cost: int) -> Budget:
    """Return the budget of a sweep as shares of the dense cost, in whatever way it is given.

    Args:
        sweep: The sweep.
        dense: Shape of its dense model.
        dense_cost: Multiply-adds of that, as the sweep counts them.

    Raises:
        SweepError: If no model of timm's has the name, or the costs are no range up to the dense
            model's.
    """
    if sweep.budget is not None:
        return sweep.budget
    if sweep.budget_gmacs is not None:
        key, given = "budget_gmacs", sweep.budget_gmacs
        low, high = 1e9 * given.low, 1e9 * given.high
    else:
        key, names = "budget_of", sweep.budget_of or ()
        costs = [macs_of(name, dense) for name in names]
        low, high = (0.5 * costs[0], float(costs[0])) if len(costs) == 1 else map(float, costs)
    if not 0.0 < low < high <= dense_cost:
        raise SweepError(
            f"{key} is {low / 1e9:.4g} to {high / 1e9:.4g} GMACs, and the dense model has "
            f"{dense_cost / 1e9:.4g} {sweep.cost}; give low < high, at most the dense model's"
        )
    return Budget(low=low / dense_cost, high=high / dense_cost)


def macs_of(name: str, like: ViTShape) -> int:
    """Return the multiply-adds of a timm model on images, and with classes, like another's.

    Raises:
        SweepError: If timm has no such Vision Transformer, or it does not take such images.
    """
    args = {"img_size": like.image, "in_chans": like.channels, "num_classes": like.classes}
    try:
        with torch.device("meta"):  # numbers only
            shape = PrunableViT.from_timm(name, pretrained=False, **args).shape()
    except ValueError as error:
        raise SweepError(f"budget_of: {error}") from error
    return cost_of(shape).macs
