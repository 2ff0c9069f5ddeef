"""One of the processes that train a trial together, each on its share of every batch.

The first runs the trial as `PlanTrial` does: it cuts, ramps, measures and saves. Before each epoch
it gives the others the model and the state of its tuner, so they hold nothing that could have gone
another way, and all train that epoch.
"""

from __future__ import annotations

import io
from typing import Any

import ray
import torch
from torch import Tensor

from pruners.training.fine_tune import TrainingLeftError
from pruners.training.optimisation import NonFiniteLossError
from pruners.training.peers import Peers
from search.data.splits import mixed_seed, trial_device
from search.sweep.spec import SweepFailedError
from search.trial.inputs import TrialInputs
from search.trial.memory import is_out_of_memory
from search.trial.preemption import ToldToEndError
from search.trial.trial import PlanTrial
from search.trial.trial_files import Saved

Order = tuple[str, dict[str, Any]]
"""A step to do: "begin" a trial of this configuration, or "go on" with the one that runs; or "end".
"""

Answer = dict[str, Any] | ToldToEndError | SweepFailedError
"""A step's metrics, or what the trial's own actor is to raise."""

GENERATORS = "generators_of_all"
"""Key of a saved tuner's state: the random generators of all workers, by rank."""


class Member(PlanTrial):
    """A trial in one of the processes that train it together."""

    def __init__(self, config: dict[str, Any], inputs: TrialInputs, peers: Peers) -> None:
        """Begin a trial; Tune, which knows nothing of this one, has nothing to set up."""
        self.peers, self.share = peers, (peers.rank, peers.size)
        self.generators: list[dict[str, Tensor]] = []  # of an epoch that goes on, by rank
        self.setup(config, inputs)

    def help(self, config: dict[str, Any], content: bytes) -> None:
        """Train an epoch as the first worker does, from what it has `packed`."""
        # Not from outside: the first worker packed it, and Ray pickles what it hands out as well.
        given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
        self.config, self.epoch, self.parts = config, given["epoch"], given["parts"]
        self.vit = given["vit"].to(self.device)
        self._new_tuner()
        self.tuner.load_state_dict(given["tuner"] | _own(given["generators"], self.peers.rank))
        try:
            self._pass_together()
        except (NonFiniteLossError, TrainingLeftError):
            pass  # the first worker finds the same, and says it
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        del self.vit, self.tuner

    def packed(self) -> bytes:
        """Return what the other workers need to train this epoch."""
        content = io.BytesIO()
        given = {
            "epoch": self.epoch,
            "parts": self.parts,
            "vit": self.vit,
            "tuner": self.tuner.state_dict(),
            "generators": self.generators if self.tuner.steps else [],
        }
        torch.save(given, content)
        return content.getvalue()

    def _pass(self) -> float:
        self.peers.shared((self.config, self.packed()))
        return self._pass_together()

    def _pass_together(self) -> float:
        try:
            return super()._pass()
        except TrainingLeftError:
            self.generators = self.peers.gathered(self.tuner.state_dict()["generators"])
            raise

    def _save(self, tuner: dict[str, Any] | None) -> None:
        in_an_epoch = tuner is not None and tuner["steps"] > 0
        super()._save(tuner | {GENERATORS: self.generators} if tuner and in_an_epoch else tuner)

    def _continue(self, saved: Saved) -> None:
        super()._continue(saved)
        self.generators = (saved.tuner or {}).get(GENERATORS, [])

    def _new_tuner(self) -> None:
        super()._new_tuner()
        self.tuner.peers = self.peers

    def _trial_seed(self, epoch: int) -> int:
        seed, rank = super()._trial_seed(epoch), self.peers.rank
        return mixed_seed(seed, rank) if rank else seed  # dropout of its own in each process


def work(given: dict[str, Any]) -> None:
    """Be a worker: the first runs the trials, the others help."""
    inputs: TrialInputs = ray.get(given["inputs"])
    peers = Peers(is_out_of_memory, trial_device(inputs.sweep))
    if peers.rank == 0:
        _lead(inputs, peers, given["desk"])
    else:
        _follow(inputs, peers)


def _lead(inputs: TrialInputs, peers: Peers, desk: Any) -> None:
    member: Member | None = None
    while True:
        verb, config = ray.get(desk.next_order.remote())
        if verb == "end":
            peers.shared(None)
            return
        if member is None:
            member = Member(config, inputs, peers)
        elif verb == "begin":
            member.reset_config(config)
        ray.get(desk.answer.remote(_answer_of(member)))


def _answer_of(member: Member) -> Answer:
    try:
        return member.step()
    except (ToldToEndError, SweepFailedError) as error:
        return error


def _follow(inputs: TrialInputs, peers: Peers) -> None:
    member: Member | None = None
    while (given := peers.shared(None)) is not None:
        config, content = given
        if member is None:
            member = Member(config, inputs, peers)
        member.help(config, content)


def _own(generators: list[dict[str, Tensor]], rank: int) -> dict[str, Any]:
    return {"generators": generators[rank]} if generators else {}
