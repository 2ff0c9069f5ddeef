"""Whether a trial whose process failed is resumed in another one.

Ray's own restarts are not used: it gives up a trial whose reused actor has died with its node, and
counts what a node did as the trial's fault.
"""

from __future__ import annotations

import re
from collections import Counter

from search.trial.preemption import ToldToEndError

NODE_MEMORY = "RAY_memory_usage_threshold"
"""What Ray says when it ended a process because its node's memory was full."""

_NO_FAULT = re.compile(
    rf"{ToldToEndError.__name__}|actor \w+ is unavailable|its node (has died|was terminated)"
    r"|node.* (preempted|drained)"
)


class Retries:
    """Counts the failures of each trial since its last epoch; what its node did is none of its."""

    def __init__(self, most: int) -> None:
        """Allow so many failures in a row."""
        self.most = most
        self.failures: Counter[str] = Counter()

    def progressed(self, trial: str) -> None:
        """Take note that a trial has reported an epoch."""
        self.failures.pop(trial, None)

    def allow(self, trial: str, said: str) -> bool:
        """Count a failure, and return whether the trial is resumed.

        Args:
            trial: The trial.
            said: What Ray says of it.
        """
        if _NO_FAULT.search(said):
            return True
        self.failures[trial] += 1
        return self.failures[trial] <= self.most
