"""Calls that one thread makes in their order, so that who asks for them need not wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MOST_WAITING = 1_000
"""Calls that may wait: one more waits for the first, so that they cannot fill the memory."""


class Background:
    """Makes calls on a thread of its own, one after another.

    What a call raises is raised by every later use, as if that had failed itself. Python waits for
    the thread before it exits.
    """

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        """Start with nothing to do."""
        self.most_waiting = most_waiting
        self._pool = ThreadPoolExecutor(1, "background")
        self._waiting: deque[Future[Any]] = deque()
        self._failure: Exception | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Make a call after those before it."""
        self._take(self.most_waiting - 1)
        self._waiting.append(self._pool.submit(self._made, function, arguments))

    def wait(self) -> None:
        """Return when all calls have been made."""
        self._take(0)

    def _made(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._failure is not None:  # later calls build on earlier ones
            return
        try:
            function(*arguments)
        except Exception as error:
            self._failure = error

    def _take(self, most: int) -> None:
        """Wait until at most so many calls wait."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._failure is not None:
            raise self._failure
