"""Runs a sweep on Ray Tune: a new one, or one that was interrupted."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TextIO

import ray
from ray import tune
from ray.tune import CheckpointConfig, ResumeConfig

from pruners import PrunableViT
from search.learning import LearningRun, learn_all
from search.progress import Progress
from search.recorder import Recorder
from search.results import Front, TrialRecord, build_front, write_front, write_trials
from search.searcher import PlanSearcher
from search.space import Space
from search.sweep import Sweep, SweepError, SweepFailedError, sweep_toml
from search.tracking import Tracker
from search.trial import PlanTrial, TrialInputs, measure_on_test

TRIALS = "trials"
"""Folder of a sweep's directory that Ray Tune keeps its state and the trials' checkpoints in."""

DONE = "done"
"""File of a sweep's directory that says that it is finished."""

RAY_SETTINGS = {  # environment variables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the recorder writes what is needed
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints errors whatever `verbose` says
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a sweep are relative to where it was started
}


def run_sweep(sweep: Sweep, dense: PrunableViT, space: Space, stream: TextIO) -> Front:
    """Run a sweep to its end, or continue an interrupted one, and return its front.

    Ray must be connected. Everything is written below the sweep's directory.

    Raises:
        SweepError: If the directory holds another sweep.
    """
    concurrent = sweep.concurrency or most_trials_at_once(sweep)
    resuming = prepare_directory(sweep)
    tracker = Tracker.open(sweep.tracking, sweep.directory, sweep.name, sweep_toml(sweep))
    progress = Progress(stream, trials=sweep.trials, epochs=sweep.epochs)
    space = with_learned(sweep, dense, space, tracker, progress)
    recorder = Recorder(sweep, tracker, progress, resuming=resuming)
    searcher = PlanSearcher(sweep, space)
    run_trials(sweep, dense, searcher, recorder, concurrent, resuming=resuming)
    searcher.export_study(sweep.directory / "study.db")
    return finish(sweep, dense, recorder)


def with_learned(
    sweep: Sweep, dense: PrunableViT, space: Space, tracker: Tracker, progress: Progress
) -> Space:
    """Let the steps that learn do so, and return the space that knows what they propose."""
    if not space.learners:
        return space
    runs: list[LearningRun] = []

    def ended(run: LearningRun) -> None:
        runs.append(run)
        progress.learned(run.describe())

    progress.learning(space.learners)
    learned = learn_all(sweep, dense, space.steps, ended, progress.still_learning)
    tracker.learned([dataclasses.asdict(run) for run in runs])
    progress.restart_clock()
    return Space(sweep, dense.shape(), learned)


def is_done(sweep: Sweep) -> bool:
    """Whether the sweep's directory holds this very sweep, finished.

    Raises:
        SweepError: If it holds another sweep.
    """
    _refuse_another(sweep)
    return (sweep.directory / DONE).exists()


def prepare_directory(sweep: Sweep) -> bool:
    """Make the sweep's directory and say whether it holds this very sweep, interrupted.

    Raises:
        SweepError: If it holds another sweep.
    """
    _refuse_another(sweep)
    if any((sweep.directory / TRIALS).glob("experiment_state-*.json")):
        return True
    sweep.directory.mkdir(parents=True, exist_ok=True)
    temporary = sweep.directory / "sweep.tmp"
    temporary.write_text(sweep_toml(sweep))
    os.replace(temporary, sweep.directory / "sweep.toml")
    return False


def _refuse_another(sweep: Sweep) -> None:
    written = sweep.directory / "sweep.toml"
    if written.exists() and written.read_text() != sweep_toml(sweep):
        raise SweepError(
            f"{sweep.directory} holds another sweep of this name; "
            "give another name or storage, or move the directory away"
        )


def run_trials(
    sweep: Sweep,
    dense: PrunableViT,
    searcher: PlanSearcher,
    recorder: Recorder,
    concurrent: int,
    *,
    resuming: bool,
) -> None:
    """Let Ray Tune run the trials."""
    inputs = TrialInputs(sweep=sweep, dense=dense)
    os.environ |= RAY_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder says what failed
    tune.run(
        tune.with_parameters(PlanTrial, inputs=inputs),
        name=TRIALS,
        storage_path=str(sweep.directory.resolve()),
        search_alg=searcher,
        num_samples=sweep.trials,
        max_concurrent_trials=concurrent,
        resources_per_trial=tune.PlacementGroupFactory([bundle(sweep)]),
        reuse_actors=True,
        callbacks=[recorder],
        checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_frequency=1),
        max_failures=sweep.max_failures,
        raise_on_failed_trial=False,
        trial_name_creator=_name,
        trial_dirname_creator=_name,
        resume_config=ResumeConfig() if resuming else None,
        verbose=0,
    )


def bundle(sweep: Sweep) -> dict[str, float]:
    """Resources of one trial, as Ray counts them."""
    resources = {"CPU": sweep.resources.cpu, "GPU": sweep.resources.gpu}
    return {key: amount for key, amount in resources.items() if amount}


def most_trials_at_once(sweep: Sweep) -> int:
    """How many trials the cluster has room for; at least 1.

    Raises:
        SweepError: If a trial asks for more than any node has.
    """
    wanted, nodes = bundle(sweep), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(node.get(key, 0.0) / amount for key, amount in wanted.items())) for node in nodes
    )
    if room == 0:
        raise SweepError(
            f"resources are {wanted} per trial, which no node of this cluster has; "
            "give less, for example --set resources.gpu=0"
        )
    return room


def finish(sweep: Sweep, dense: PrunableViT, recorder: Recorder) -> Front:
    """Measure the front and the dense model on the test split, once, and write everything down.

    Raises:
        SweepFailedError: If the dense model could not be measured, so that there is no front.
    """
    records = recorder.records
    failed = next(
        (r for r in records.values() if r.origin == "dense" and r.status != "dense"), None
    )
    if failed is not None:
        raise SweepFailedError(
            f"the dense model could not be measured: {failed.reason or failed.status}"
        )
    front = build_front(list(records.values()), sweep.cost)
    measure = ray.remote(measure_on_test).options(
        num_cpus=sweep.resources.cpu, num_gpus=sweep.resources.gpu, max_retries=sweep.max_failures
    )
    names = [front.dense.trial, *(member.trial for member in front.members)]
    shared = ray.put(dense)
    pending = {
        name: measure.remote(sweep.directory.resolve() / records[name].checkpoint, sweep, shared)
        for name in names
    }
    for name, top1 in pending.items():
        records[name] = dataclasses.replace(records[name], test_top1=ray.get(top1))
    return write_all(sweep, recorder, sorted(records.values(), key=lambda r: r.trial))


def write_all(sweep: Sweep, recorder: Recorder, records: list[TrialRecord]) -> Front:
    """Write the final records and the front, on disk and in MLflow."""
    front = build_front(records, sweep.cost)
    write_trials(sweep.directory / "trials.parquet", records)
    write_front(sweep.directory / "front.json", front)
    recorder.tracker.close(front, records)
    (sweep.directory / DONE).touch()
    return front


def _name(trial: tune.experiment.Trial) -> str:
    return str(trial.config["trial"])
