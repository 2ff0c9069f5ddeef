"""The processes that train a trial, as it sees them; the case of one alone."""

from __future__ import annotations

from typing import Protocol

from pruners.training.fine_tune import FineTuner
from pruners.training.peers import Peers
from search.trial.training import Training
from search.trial.trial_files import TunerState


class Workers(Protocol):
    """Those that train a trial's epochs, seen from the process that runs the trial."""

    @property
    def peers(self) -> Peers | None:
        """All of them, to agree with each other; None of one alone."""

    def train(self, training: Training, epoch: int) -> float:
        """Train an epoch, or what is left of one, on all of them; return its mean loss."""

    def state(self, tuner: FineTuner) -> TunerState:
        """Return the state of training, of all of them."""

    def resume(self, state: TunerState) -> None:
        """Take what `state` returned in an earlier process."""


class OneWorker:
    """The process that runs the trial, alone."""

    peers = None

    def train(self, training: Training, epoch: int) -> float:
        """Train an epoch, or what is left of one; return its mean loss."""
        return training.train(epoch)

    def state(self, tuner: FineTuner) -> TunerState:
        """Return the tuner's state."""
        return tuner.state_dict()

    def resume(self, state: TunerState) -> None:
        """Take nothing: the tuner takes its state."""
