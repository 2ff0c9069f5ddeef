"""Lets Ray Tune go on when Ray ends a trial's process because its node's memory is full.

Ray then raises an error of its own, which is not that of an actor that died. Ray Tune 2.60 does not
expect it and ends the whole experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import tune_controller


class _ActorManager(RayActorManager):
    """Takes an actor that was ended for its node's memory as what it is: dead."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        super()._actor_task_failed(tracked_actor_task, exception)


@contextmanager
def full_nodes_end_actors_only() -> Iterator[None]:
    """Let Ray Tune, as long as this lasts, see a trial's failure where its node was full."""
    tune_controller.RayActorManager = _ActorManager
    try:
        yield
    finally:
        tune_controller.RayActorManager = RayActorManager
