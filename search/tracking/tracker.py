"""Follows the ledger into MLflow: on a thread of its own, in order, with retries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from mlflow.exceptions import MlflowException

from search.records.front import Front
from search.records.journal import Journal
from search.records.trial_record import TrialRecord
from search.sweep.spec import SweepFailedError
from search.tracking.client import first_line
from search.tracking.runs import SweepRuns

POLL_S, WAIT_S = 0.2, 0.02
"""Seconds between the looks of the thread at the ledger, and of whoever waits at the thread."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Backoff while MLflow fails: first and longest pause between retries, in seconds."""

LAST_PATIENCE_S = 900.0
"""Seconds that the end of a sweep waits for MLflow."""


class Tracker:
    """Logs a sweep to MLflow while it runs.

    Trials never wait for it: while MLflow is slow, refuses, or is away, their events are in the
    ledger. Each event is logged once: a retry looks first whether it is there. A driver that
    resumes a sweep continues at the place that the last one noted.

    Attributes:
        trouble: MLflow's latest error; empty while it answers.
    """

    def __init__(self, runs: SweepRuns, ledger: Journal) -> None:
        """Start to follow a ledger."""
        self.runs, self.ledger = runs, ledger
        self.trouble = ""
        self._lock = threading.Lock()
        self._write: Callable[[], None] | None = None  # after the events
        self._failure: Exception | None = None
        self._wake, self._end = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="tracking", daemon=True).start()

    def show(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Show a front as soon as its trials are there; only the latest counts."""
        with self._lock:
            self._write = partial(self.runs.show, front, records)

    def wait(self, seconds: float) -> bool:
        """Wait until all of the ledger is logged; False if it is not, after so many seconds.

        Raises:
            Exception: The error that ended the thread, never MLflow's: a damaged ledger, a lost
                lease, or a mistake here.
        """
        deadline = time.monotonic() + seconds
        while not self._is_current():
            if self._failure is not None:
                raise self._failure
            if time.monotonic() >= deadline:
                return False
            self._wake.set()
            time.sleep(WAIT_S)
        return True

    def finish(
        self,
        front: Front,
        records: Sequence[TrialRecord],
        steps: Sequence[Callable[[SweepRuns], None]] = (),
        seconds: float = LAST_PATIENCE_S,
    ) -> None:
        """Log the final front with its test accuracies, then take further steps.

        Args:
            front: The front.
            records: All trials.
            steps: Further steps, one by one; each may be retried.
            seconds: How long MLflow may take for each.

        Raises:
            SweepFailedError: If MLflow did not take everything.
        """
        first = partial(self.runs.close, front, records)
        for write in (first, *(partial(step, self.runs) for step in steps)):
            with self._lock:
                self._write = write
            if not self.wait(seconds):
                raise SweepFailedError(
                    f"MLflow has not taken everything for {seconds:.0f} s "
                    f"({self.trouble or 'it is slow'}); the front is in {self.runs.directory}, "
                    "run the same command again to log it"
                )

    def close(self) -> None:
        """Log no more; a tracker of the same ledger goes on from here."""
        self._end.set()

    def _is_current(self) -> bool:
        with self._lock:
            waiting = self._write is not None
        return not waiting and not self.ledger.read_from(self.runs.place)

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # raised by `wait`: nobody hears what a thread raises
            self._failure = error

    def _follow(self) -> None:
        while not self._end.is_set():
            with self._lock:  # first: the trials of a front must be there
                write = self._write
            for event, place in self.ledger.read_from(self.runs.place):
                self._persist(partial(self.runs.log, event, place))
            if write is not None:
                self._persist(write)
                with self._lock:
                    if self._write is write:  # else a later front waits
                        self._write = None
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _persist(self, write: Callable[[], None]) -> None:
        """Retry a write until it succeeds, or the sweep has ended."""
        pause = FIRST_PAUSE_S
        while not self._end.is_set():
            self.runs.notes.may_write()
            try:
                write()
            except (MlflowException, OSError) as error:  # what databases raise, MLflow wraps
                self.runs.again, self.trouble = True, first_line(error)
                self._end.wait(pause)
                pause = min(2.0 * pause, LONGEST_PAUSE_S)
            else:
                self.runs.again, self.trouble = False, ""
                return
