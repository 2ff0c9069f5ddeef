"""Calls that fail by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException


def flaky(call: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """Let every second call fail, by chance, before or after it is done."""
    rng = random.Random(0)

    def one(*args: Any, **more: Any) -> Any:
        fails = rng.random() < 0.5
        if fails and not after:
            raise MlflowException("refused")
        answer = call(*args, **more)
        if fails:
            raise TimeoutError("the answer was lost")
        return answer

    return one
