"""The epochs at which successive halving compares trials."""

from __future__ import annotations

import math


def milestones(epochs: int, first: int, eta: float) -> list[int]:
    """Return the epochs after which trials are compared: first, first eta, first eta^2 and so on.

    Epoch 0, before fine-tuning, is followed by 1. The full length is no milestone: a trial that
    reaches it has ended.

    Args:
        epochs: Full length of a trial.
        first: The first milestone.
        eta: A trial goes on if it is among the best 1/eta.

    Raises:
        ValueError: If a value is out of range.
    """
    if not (math.isfinite(eta) and eta > 1.0):
        raise ValueError(f"eta is {eta}; give a number above 1")
    if not 0 <= first < epochs:
        raise ValueError(f"first is {first} of {epochs} epochs; give 0 <= first < epochs")
    found, length = [first], float(max(first, 1))
    while (epoch := int(length + 1e-9)) < epochs:  # powers of eta may be a rounding error short
        if epoch > found[-1]:
            found.append(epoch)
        length *= eta
    return found
