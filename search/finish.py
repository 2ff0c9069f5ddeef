"""The end of a sweep: its front is measured on test, written down, and registered."""

from __future__ import annotations

import dataclasses

import ray

from pruners import PrunableViT
from search.prepare.task import cause_of, worker_task
from search.records.atomic import writing_to
from search.records.files import DONE, write_front, write_trials
from search.records.front import Front, build_front
from search.records.ledger import Ledger
from search.records.trial_record import TrialRecord
from search.report.progress import Progress
from search.sweep.spec import Sweep, SweepFailedError
from search.tracking.registry import Registration
from search.tracking.serving import served_models, start_serving
from search.tracking.tracker import Tracker
from search.trial.measure_on_test import measure_on_test


def finish(
    sweep: Sweep,
    dense: PrunableViT,
    digests: dict[str, str],
    ledger: Ledger,
    tracker: Tracker,
    progress: Progress,
) -> Front:
    """Measure the front and the dense model on the test split, once, and write everything down.

    Raises:
        SweepFailedError: If the dense model could not be measured, so that there is no front, or if
            a model of the front is no longer what its trial left.
    """
    records = dict(ledger.records)
    failed = next(
        (r for r in records.values() if r.origin == "dense" and r.status != "dense"), None
    )
    if failed is not None:
        raise SweepFailedError(
            f"the dense model could not be measured: {failed.reason or failed.status}"
        )
    front = build_front(list(records.values()), sweep.cost)
    measure = worker_task(sweep, measure_on_test)
    names = [front.dense.trial, *(member.trial for member in front.members)]
    shared = ray.put(dense)
    pending = {
        name: measure.remote(sweep.directory.resolve() / records[name].checkpoint, sweep, shared)
        for name in names
    }
    serving = start_serving(sweep, front, pending, digests) if sweep.register_front else {}
    for name, top1 in pending.items():
        try:
            records[name] = dataclasses.replace(records[name], test_top1=ray.get(top1))
        except ray.exceptions.RayError as error:
            reason = f"trial {name} could not be tested: {cause_of(error)}"
            raise SweepFailedError(reason) from error
    served, unserved = served_models(serving)
    tested = sorted(records.values(), key=lambda r: r.trial)
    registration = Registration(
        model=sweep.model_name,
        sweep=sweep.name,
        front=build_front(tested, sweep.cost, ledger.growing.classes),
        served=served,
        failed=unserved,
        digests=digests,
        budgets=sweep.alias_budgets,
    )
    write_all(sweep, tracker, tested, registration)
    lines = registration.lines()
    if registration.versions:
        where = sweep.tracking or sweep.directory
        promote = f"python -m search promote {sweep.model_name} VERSION --tracking {where}"
        lines.append(f"approve one of them: {promote}")
    progress.registered(lines)
    return registration.front


def write_all(
    sweep: Sweep, tracker: Tracker, records: list[TrialRecord], registration: Registration
) -> None:
    """Write the final records and the front, on disk and in MLflow."""
    front = registration.front
    with writing_to(sweep.directory):
        write_trials(sweep.directory / "trials.parquet", records)
        write_front(sweep.directory / "front.json", front)
    tracker.finish(front, records, registration.steps())
    (sweep.directory / DONE).touch()
