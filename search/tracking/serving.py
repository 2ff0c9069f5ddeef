"""Makes the MLflow models of a front, all at once, as Ray tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from search.prepare.task import cause_of
from search.records.front import Front, cost_ratio
from search.sweep.spec import Sweep, SweepFailedError
from search.tracking.served import Served, make_served


def start_serving(
    sweep: Sweep, front: Front, tests: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Let Ray make the models; return trial -> reference of its `Served`.

    Args:
        sweep: The sweep.
        front: Its front.
        tests: Trial -> reference of its top-1 on test, which the model's metadata hold.
        digests: SHA-256 of the dense model and of each split, by the sweep's keys.
    """
    make = ray.remote(make_served).options(
        num_cpus=sweep.resources.cpu, num_gpus=0, max_retries=sweep.max_failures
    )
    return {
        member.trial: make.remote(
            sweep, member, cost_ratio(front, member), dict(digests), tests[member.trial]
        )
        for member in front.members
    }


def served_models(pending: Mapping[str, Any]) -> tuple[dict[str, Served], dict[str, str]]:
    """Wait for the models; return trial -> model, and trial -> reason of its failure.

    A trial without one is a member of the front all the same: its weights are there.

    Raises:
        SweepFailedError: If the sweep's directory cannot be written to.
    """
    served, failed = {}, {}
    for trial, model in pending.items():
        try:
            served[trial] = ray.get(model)
        except ray.exceptions.RayError as error:
            cause = cause_of(error)
            if isinstance(cause, SweepFailedError):
                raise cause from error
            failed[trial] = " ".join(str(cause).split())[:500]
    return served, failed
