"""Tells the ledger, MLflow and the terminal what Ray reports, and keeps the tables current."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.records.atomic import writing_to
from search.records.events import EpochResult, TrialConfig
from search.records.files import write_front, write_trials
from search.records.ledger import Ledger
from search.report.progress import Progress
from search.strategy.searcher import PlanSearcher
from search.sweep.spec import SweepFailedError
from search.tracking.tracker import Tracker
from search.trial.retries import NODE_MEMORY, Retries
from search.trial.trial_files import hung_path
from search.trial.watchdog import has_hung

REST = 19.0
"""How long the tables stay as they are, in multiples of the time that writing them took.

They hold all trials, so that a larger sweep takes longer to write them: at most a twentieth of its
time, however large it is.
"""

PATIENCE_S = 30.0
"""How long the end of the trials waits for MLflow; what is missing is logged later."""


class Recorder(tune.Callback):
    """Records the events of trials, as Ray Tune calls back.

    What ends is in the ledger at once; the tables, which are written as a whole, follow, and so
    does MLflow.
    """

    def __init__(
        self,
        ledger: Ledger,
        tracker: Tracker,
        progress: Progress,
        searcher: PlanSearcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Record into a ledger and a terminal; an open tracker follows the ledger.

        The searcher is told which trials whose process failed are resumed.
        """
        self.ledger, self.tracker, self.progress, self.clock = ledger, tracker, progress, clock
        self.searcher, self.retries = searcher, Retries(ledger.sweep.max_failures)
        self.written, self.due = True, -math.inf  # of the tables: are they current, when again
        self.failure: SweepFailedError | None = None
        progress.restored(ledger.ended)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Say that a trial starts."""
        self.progress.started(self.ledger.records[trial.config["trial"]])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Take an epoch's metrics, unless they are known: a trial that is resumed repeats them."""
        with self._stopping():
            epoch = EpochResult.from_report(result)
            if self.failure is None and self.ledger.report(epoch):
                self.retries.progressed(epoch.trial)
                self.progress.epoch(self.ledger.records[epoch.trial])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Close the record of a trial that ended by itself."""
        record = self.ledger.records[trial.config["trial"]]
        status = "stopped" if record.status == "running" else record.status
        if record.origin == "dense" and status == "finished":
            status = "dense"
        self._end(record.trial, status, record.reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Hand out a trial again whose process failed, or close its record.

        One that its node ran out of memory for will pass its batches in twice as many parts.
        """
        config = TrialConfig.from_json(trial.config)
        name, parts = config.trial, config.parts
        reason, said = self._reason(trial), last_failure(trial)
        self._stop_if_unwritable(reason)
        if self.failure is not None:
            return
        if NODE_MEMORY in said:
            parts = 2 * parts
            reason = f"its node ran out of memory; batches in {parts} parts"
        if self.retries.allow(name, said):
            self.searcher.hand_out_again(trial.trial_id, parts)
            self.progress.goes_on(self.ledger.records[name], reason)
        else:
            self.searcher.give_up(trial.trial_id)
            self._end(name, "failed", reason)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Let the terminal show that the sweep is alive, and the tables follow.

        Raises:
            SweepFailedError: If the sweep's directory cannot be written to.
        """
        if self.failure is not None:
            raise self.failure
        self._write_tables_if_due()
        self.progress.tick(self.tracker.trouble)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Write down the last trials; Ray calls this after an interrupt too."""
        if self.failure is not None:
            return  # MLflow may be in the directory that cannot be written to
        if not self.written:
            self._write_tables()
        self.tracker.wait(PATIENCE_S)

    def _end(self, trial: str, status: str, reason: str) -> None:
        if self.failure is not None:
            return
        with self._stopping():
            record, front = self.ledger.end(trial, status, reason), self.ledger.growing.front
            self.written = False
            self._write_tables_if_due()
            self.progress.ended_with(record, front)

    def _reason(self, trial: Trial) -> str:
        """Say in a line why a trial's process failed."""
        sweep, hung = self.ledger.sweep, hung_path(trial.config["trial"])
        if has_hung(sweep.directory / hung):
            limit = f"max_epoch_hours = {sweep.max_epoch_hours:g}"
            return f"timed out: an epoch took longer than {limit}; {hung} says where it hung"
        lines = [line.strip() for line in last_failure(trial).splitlines() if line.strip()]
        return lines[-1] if lines else "the trial's process died"

    def _stop_if_unwritable(self, reason: str) -> None:
        """Stop the sweep if a trial could not be saved: none could."""
        _, failed, what = reason.partition(f"{SweepFailedError.__name__}: ")
        if failed and self.failure is None:
            self.failure = SweepFailedError(what)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let the sweep stop at the end of a step: Ray logs what is raised where a trial ends."""
        try:
            yield
        except SweepFailedError as failure:
            self.failure = failure

    def _write_tables_if_due(self) -> None:
        if not self.written and self.clock() >= self.due:
            self._write_tables()

    def _write_tables(self) -> None:
        start, directory = self.clock(), self.ledger.sweep.directory
        records = sorted(self.ledger.records.values(), key=lambda r: r.trial)
        front = self.ledger.growing.front
        with writing_to(directory):
            write_trials(directory / "trials.parquet", records)
            if front is not None:
                write_front(directory / "front.json", front)
        if front is not None:
            self.tracker.show(front, records)
        self.written, self.due = True, self.clock() + REST * (self.clock() - start)


def last_failure(trial: Trial) -> str:
    """Return Ray's message on a trial's last failure; empty without one."""
    if trial.error_file is None or not Path(trial.error_file).exists():
        return ""
    return Path(trial.error_file).read_text().rpartition("Failure # ")[2]
