"""Notice that a process is about to be ended: told by SIGTERM, or its node is taken away."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray

LOOK_S = 2.0
"""How often it is asked whether the node is being drained; a preempted one has some 30 s."""


class ToldToEndError(RuntimeError):
    """A trial's process was told to end; the trial's state is saved."""


class Notice:
    """Says whether the process of an actor should save what it has and end."""

    def __init__(self) -> None:
        """Nothing has been said yet."""
        self._told = threading.Event()
        self._looked = time.monotonic()

    def given(self) -> bool:
        """Whether it should."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            if node_is_drained():
                self._told.set()
        return self._told.is_set()

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let SIGTERM be noticed instead of ending the process at once.

        Only where somebody asks `given` every few seconds. Signals reach the main thread alone; in
        others nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told.set()


def node_is_drained() -> bool:
    """Whether Ray takes this node away: a spot node that is preempted, or one scaled down.

    `ray start --block` begins that on SIGTERM, and `ray drain-node` by hand. False outside Ray.
    """
    if not ray.is_initialized():
        return False
    # Ray Train's own watcher asks the same; there is no public way.
    draining = ray._private.state.state.get_draining_nodes()
    return ray.get_runtime_context().get_node_id() in draining
