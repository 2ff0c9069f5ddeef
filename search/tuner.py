"""Runs a sweep on Ray Tune: a new one, or one that was interrupted."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TextIO

import ray
from ray import tune

from pruners import PrunableViT
from pruners.families.learned import Learned
from pruners.model.files import replace_file
from search.data.fingerprint import fingerprint
from search.data.shards import Shards, find_shards
from search.finish import finish
from search.prepare.elastic import ElasticStart, tune_elastic
from search.prepare.learning import LearningRun, learn_all
from search.prepare.rotation import turned
from search.recorder import Recorder
from search.records.atomic import writing_to
from search.records.files import DONE, read_front
from search.records.front import Front, build_front
from search.records.lease import hold
from search.records.ledger import Ledger
from search.records.trial_record import TrialRecord
from search.report.progress import Progress, front_line
from search.space.build import build_space
from search.space.draw import draw_plans
from search.space.space import Space
from search.strategy.export_study import export_study
from search.strategy.fifo import InOrder
from search.strategy.moasha import MoAsha
from search.strategy.searcher import PlanSearcher
from search.sweep.spec import Sweep, SweepError, SweepInterruptedError
from search.sweep.toml import load_sweep, sweep_toml
from search.tracking.runs import SweepRuns
from search.tracking.tracker import Tracker
from search.trial.inputs import TrialInputs
from search.trial.node_memory import full_nodes_end_actors_only
from search.trial.tune_adapter import PlanTrial
from search.trial.worker_group import HEAD, SharedTrial, ray_folder, worker_bundle

ELASTIC_PLANS = 256
"""Plans that are drawn for an elastic start; longer ones go through them again."""

RAY_SETTINGS = {  # environment variables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the recorder writes what is needed
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints errors whatever `verbose` says
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a sweep are relative to where it was started
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # search.trial.retries restarts
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # Ray's snapshots, which nothing reads
}


def run_sweep(sweep: Sweep, dense: PrunableViT, stream: TextIO) -> Front:
    """Run a sweep to its end, or resume an interrupted one, and return its front.

    Ray must be connected, and the sweep's budget be one of shares. Everything is written below the
    sweep's directory.

    Raises:
        SweepError: If the directory holds another sweep, or another driver runs this one, or
            `start_from` holds none.
        SweepInterruptedError: If it was interrupted (Ctrl-C); the same call resumes it.
    """
    concurrent = sweep.concurrency or most_trials_at_once(sweep)
    earlier = earlier_front(sweep)
    prepare_directory(sweep)
    with hold(sweep.directory, partial(print, file=stream, flush=True)) as lease:
        ledger = Ledger(sweep, may_write=lease.check)
        dense = turned(sweep, dense)
        runs = SweepRuns.open(sweep, dense.shape(), lease.check, earlier)
        ledger.begin()
        digests = fingerprint(sweep, dense)
        ledger.identify(digests)
        val = val_shards(sweep)
        ledger.add_once("classes", names=list(val.classes))
        with closing(Tracker(runs, ledger.journal)) as tracker:
            progress = Progress(stream, trials=sweep.trials, epochs=sweep.epochs)
            space = build_space(sweep, dense.shape())
            space = with_learned(sweep, dense, space, ledger, progress)
            inputs = TrialInputs(
                sweep=sweep,
                dense=dense,
                start=elastic_start(sweep, dense, space, ledger, progress),
                directory=sweep.directory.resolve(),
                attempt=lease.attempt.number,
                fingerprint=digests,
            )
            known = [member.parameters for member in earlier.members] if earlier else []
            searcher = PlanSearcher(sweep, space, ledger, earlier=known, val_images=val.rows)
            run_trials(inputs, searcher, Recorder(ledger, tracker, progress, searcher), concurrent)
            records = list(ledger.records.values())
            if not searcher.phases.finished or any(r.status == "running" for r in records):
                raise SweepInterruptedError(interrupted_line(sweep, records))
            progress.stopped(searcher.phases.stopped)
            export_study(searcher.phases.proposer.study, sweep.directory / "study.db")
            return finish(sweep, dense, digests, ledger, tracker, progress)


def earlier_front(sweep: Sweep) -> Front | None:
    """Return the front that a sweep starts from; None if it starts from none.

    Raises:
        SweepError: If there is no such front.
    """
    if sweep.start_from is None:
        return None
    try:
        return read_front(Path(sweep.start_from) / "front.json")
    except (FileNotFoundError, ValueError) as error:
        raise SweepError(f"start_from: {error}") from error


def val_shards(sweep: Sweep) -> Shards:
    """Find the files of the validation images."""
    data = sweep.data
    return find_shards(data.val, data.image_column, data.label_column)


def interrupted_line(sweep: Sweep, records: list[TrialRecord]) -> str:
    """Say how far a sweep came, and how to resume it."""
    ended = [r for r in records if r.status != "running"]
    front = "no front yet"
    if any(r.status == "dense" for r in ended):
        front = f"the front so far: {front_line(build_front(ended, sweep.cost))}"
    return (
        f"interrupted after {len(ended)} trials; {front}. "
        f"Everything is in {sweep.directory}; run the same command again to continue"
    )


def with_learned(
    sweep: Sweep, dense: PrunableViT, space: Space, ledger: Ledger, progress: Progress
) -> Space:
    """Let all steps learn or score, and return the space of the measured methods."""
    runs: list[LearningRun] = []

    def ended(run: LearningRun) -> None:
        runs.append(run)
        if run.learns:
            progress.learned(run.describe())

    if space.learners:
        progress.learning(space.learners)
    learned = learn_all(sweep, dense, space.steps, ended, progress.still_learning)
    ledger.add_once("learned", runs=[dataclasses.asdict(run) for run in runs])
    progress.restart_clock()
    return space.measured(learned)


def elastic_start(
    sweep: Sweep, dense: PrunableViT, space: Space, ledger: Ledger, progress: Progress
) -> PrunableViT:
    """Return the model that trials cut: the dense one, or the one that was tuned for cuts."""
    if not sweep.elastic_epochs:
        return dense
    smallest, plans = draw_plans(space, ELASTIC_PLANS, sweep.seed)
    learned = {
        rung.pruner: Learned.load(Path(rung.path))
        for step in space.steps
        for rung in step.rungs
        if rung.path
    }
    start = ElasticStart(
        epochs=sweep.elastic_epochs, smallest=smallest, plans=tuple(plans), learned=learned
    )
    progress.tuning_elastic()
    run = tune_elastic(sweep, dense, start, progress.still_tuning_elastic)
    progress.learned(run.describe())
    ledger.add_once("elastic", run=dataclasses.asdict(run))
    progress.restart_clock()
    return PrunableViT.load(Path(run.path))


def is_done(sweep: Sweep) -> bool:
    """Whether the sweep's directory holds this very sweep, finished.

    Raises:
        SweepError: If it holds another sweep.
    """
    _refuse_another(sweep)
    return (sweep.directory / DONE).exists()


def prepare_directory(sweep: Sweep) -> None:
    """Make the sweep's directory; it may hold this very sweep, interrupted.

    Raises:
        SweepError: If it holds another sweep.
    """
    _refuse_another(sweep)
    with writing_to(sweep.directory):
        sweep.directory.mkdir(parents=True, exist_ok=True)
        content = sweep_toml(sweep)
        replace_file(sweep.directory / "sweep.toml", lambda path: path.write_text(content))


def _refuse_another(sweep: Sweep) -> None:
    written = sweep.directory / "sweep.toml"
    # By value: one that an older version wrote lacks the keys that came since.
    if written.exists() and sweep_toml(load_sweep(written)) != sweep_toml(sweep):
        raise SweepError(
            f"{sweep.directory} holds another sweep of this name; "
            "give another name or storage, or move the directory away"
        )


def run_trials(
    inputs: TrialInputs, searcher: PlanSearcher, recorder: Recorder, concurrent: int
) -> None:
    """Let Ray Tune run the trials.

    Ray keeps a state of its own beside them, which is not used: the ledger says what has happened.
    """
    sweep, scheduler = inputs.sweep, InOrder()
    if sweep.halving is not None:
        scheduler = MoAsha(epochs=sweep.epochs, **sweep.halving.model_dump())
        scheduler.replay(recorder.ledger.past)
    shutil.rmtree(sweep.directory / ray_folder(sweep), ignore_errors=True)
    trainable = PlanTrial if sweep.resources.workers == 1 else SharedTrial
    os.environ |= RAY_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder says what failed
    with full_nodes_end_actors_only():
        tune.run(
            tune.with_parameters(trainable, inputs=inputs),
            name=ray_folder(sweep),
            storage_path=str(sweep.directory.resolve()),
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when there are no more
            max_concurrent_trials=concurrent,
            resources_per_trial=tune.PlacementGroupFactory([bundle(sweep)]),
            reuse_actors=True,
            callbacks=[recorder],
            max_failures=0,  # search.trial.retries decides
            raise_on_failed_trial=False,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            verbose=0,
        )
    shutil.rmtree(sweep.directory / ray_folder(sweep), ignore_errors=True)


def bundle(sweep: Sweep) -> dict[str, float]:
    """Resources of a trial's actor; those of several workers are Ray Train's to ask for."""
    return worker_bundle(sweep) if sweep.resources.workers == 1 else HEAD


def most_trials_at_once(sweep: Sweep) -> int:
    """How many trials the cluster has room for; at least 1.

    Raises:
        SweepError: If a worker asks for more than any node has, or there is no room for all.
    """
    wanted, workers = worker_bundle(sweep), sweep.resources.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(node.get(key, 0.0) / amount for key, amount in wanted.items())) for node in nodes
    )
    if room == 0:
        raise SweepError(
            f"resources are {wanted} per {'trial' if workers == 1 else 'worker'}, which no node of "
            "this cluster has; give less, for example --set resources.gpu=0, or where nodes join "
            "when they are needed, how many trials may run at once: --set concurrency=8"
        )
    if room < workers:
        raise SweepError(
            f"resources are {workers} workers of {wanted} per trial, and this cluster has room for "
            f"{room}; give less, for example --set resources.workers={room}"
        )
    return room // workers


def _name(trial: tune.experiment.Trial) -> str:
    return str(trial.config["trial"])
