"""The processes of a worker group that train a trial together, each on its share of every batch.

The first runs the trial as one process alone does: it cuts, ramps, measures and saves. Before each
epoch it gives the others the model and the state of its tuner, so they hold nothing that could have
gone another way, and all train that epoch.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from pruners.training.fine_tune import FineTuner, TrainingLeftError
from pruners.training.optimisation import NonFiniteLossError
from pruners.training.peers import Peers
from search.data.splits import trial_device
from search.records.events import EpochResult, TrialConfig
from search.sweep.spec import SweepFailedError
from search.trial.context import TrialContext, time_limit
from search.trial.inputs import TrialInputs
from search.trial.memory import is_out_of_memory
from search.trial.preemption import ToldToEndError
from search.trial.training import Training
from search.trial.trial import Trial
from search.trial.trial_files import TunerState

STEP, END = "step", "end"

Order = TrialConfig | str
"""An order to the first worker: begin a trial and run a step, `STEP` once more, or `END`."""

Answer = EpochResult | ToldToEndError | SweepFailedError
"""A step's result, or what the trial's own actor is to raise."""

Generators = dict[str, Tensor]
"""States of a process's random generators, by device."""

GENERATORS = "generators_of_all"
"""Key of a saved tuner's state: the random generators of all workers, by rank."""


@dataclass(frozen=True, kw_only=True)
class Handout:
    """Model and state of training that the first worker hands out before an epoch.

    Attributes:
        config: The trial's.
        epoch: Number of the epoch, from 1.
        state: The model and the state of its tuner, as `torch.save` writes them, and the random
            generators of all workers where the epoch is resumed in its middle.
    """

    config: TrialConfig
    epoch: int
    state: bytes


class FirstWorker:
    """The first of several processes that train a trial, which runs it."""

    def __init__(self, peers: Peers) -> None:
        """Give the others nothing yet."""
        self.peers = peers
        self._generators: list[Generators] = []  # of an epoch that was left, by rank

    def train(self, training: Training, epoch: int) -> float:
        """Train an epoch, or what is left of one, on all workers; return its mean loss."""
        self.peers.shared(
            Handout(config=training.config, epoch=epoch, state=self._packed(training))
        )
        try:
            return training.train(epoch)
        except TrainingLeftError:
            self._generators = _gathered(training, self.peers)
            raise

    def state(self, tuner: FineTuner) -> TunerState:
        """Return the tuner's state; in the middle of an epoch, with all workers' generators."""
        state = tuner.state_dict()
        return state | {GENERATORS: self._generators} if state["steps"] > 0 else state

    def resume(self, state: TunerState) -> None:
        """Take the generators of all workers."""
        self._generators = state.get(GENERATORS, [])

    def end(self) -> None:
        """Let the others end."""
        self.peers.shared(None)

    def _packed(self, training: Training) -> bytes:
        content = io.BytesIO()
        given = {
            "vit": training.vit,
            "tuner": training.tuner.state_dict(),
            "generators": self._generators if training.tuner.steps else [],
        }
        torch.save(given, content)
        return content.getvalue()


def help_train(context: TrialContext, given: Handout, peers: Peers) -> None:
    """Train an epoch as the first worker does, from what it has handed out."""
    # Not from outside: the first worker packed it, and Ray pickles what it hands out as well.
    state = torch.load(io.BytesIO(given.state), map_location="cpu", weights_only=False)
    training = Training(context, given.config, state["vit"].to(context.device), peers)
    training.tuner.load_state_dict(state["tuner"] | _own(state["generators"], peers.rank))
    try:
        training.train(given.epoch)
    except TrainingLeftError:
        _gathered(training, peers)  # the first worker finds the same, and says it
    except NonFiniteLossError:
        pass  # likewise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise


def work(given: dict[str, Any]) -> None:
    """Be a worker: the first runs the trials, the others help."""
    inputs: TrialInputs = ray.get(given["inputs"])
    peers = Peers(is_out_of_memory, trial_device(inputs.sweep))
    if peers.rank == 0:
        _lead(inputs, peers, given["desk"])
    else:
        follow(inputs, peers)


def _lead(inputs: TrialInputs, peers: Peers, desk: Any) -> None:
    workers = FirstWorker(peers)
    trial: Trial | None = None
    while True:
        order: Order = ray.get(desk.next_order.remote())
        if order == END:
            workers.end()
            return
        if isinstance(order, TrialConfig):
            trial = trial.next(order) if trial else Trial.first(inputs, order, workers)
        if trial is None:
            raise AssertionError("the first order is a trial's configuration")
        ray.get(desk.answer.remote(_answer_of(trial)))


def _answer_of(trial: Trial) -> Answer:
    try:
        return trial.step()
    except (ToldToEndError, SweepFailedError) as error:
        return error


def follow(inputs: TrialInputs, peers: Peers) -> None:
    """Help the first worker until it says that there is no more to do."""
    context: TrialContext | None = None
    while (given := peers.shared(None)) is not None:
        if context is None:
            with time_limit(inputs.sweep, inputs.directory, given.config.trial):
                context = TrialContext.open(inputs)
        help_train(context, given, peers)


def _gathered(training: Training, peers: Peers) -> list[Generators]:
    """Return the states of all processes' random generators, by rank."""
    return peers.gathered(training.tuner.state_dict()["generators"])


def _own(generators: list[Generators], rank: int) -> dict[str, Generators]:
    return {"generators": generators[rank]} if generators else {}
