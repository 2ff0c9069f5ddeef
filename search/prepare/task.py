"""What is prepared once for a sweep runs as a Ray task on the resources of one of its workers."""

from __future__ import annotations

from typing import Any

import ray

from search.sweep.spec import Sweep


def worker_task(sweep: Sweep, function: Any) -> Any:
    """Return a function as a remote one, whose task is run again where its node is lost."""
    resources = sweep.resources
    return ray.remote(function).options(
        num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=sweep.max_failures
    )


def cause_of(error: Exception) -> Exception:
    """Return what went wrong in a task, which Ray's error wraps where it knows it."""
    cause: Exception = getattr(error, "cause", None) or error
    return cause
