"""The trials of a sweep in their order: dense model, search, confirmation, final training.

Nothing here knows Ray. Which trial comes next follows from what was asked for and told before, so
that a driver that starts again replays the ledger and is where the one before it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence

from pruners import Plan
from search.records.events import EpochResult, Event, TrialConfig, TrialEnd, of_trial
from search.records.ledger import Ledger
from search.space.space import Proposal, Space
from search.space.step import Parameters
from search.strategy.confirm import standard_error, to_confirm, to_train_long
from search.strategy.feedback import Feedback
from search.strategy.proposer import Proposer, Told
from search.strategy.stopping import why_stop
from search.sweep.spec import Sweep, SweepError, SweepFailedError


class Phases:
    """Decides which trial comes next, and passes on how each ended.

    Attributes:
        proposer: Proposes the plans of the search.
        running: Trial -> configuration, of trials that have not ended.
        asked: How many trials there have been.
        stopped: Why no more plans are asked for; empty as long as they are.
        finished: Whether everything has been handed out.
    """

    def __init__(
        self,
        sweep: Sweep,
        space: Space,
        ledger: Ledger,
        *,
        earlier: Sequence[Parameters] = (),
        val_images: int = 1_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin, or resume from the ledger; the arguments are those of `PlanSearcher`.

        Raises:
            SweepError: If the ledger says that something else was proposed.
        """
        self.sweep, self.ledger, self.val_images = sweep, ledger, val_images
        self.proposer = Proposer(sweep=sweep, space=space, earlier=earlier)
        self.feedback = Feedback(sweep, self.proposer)
        self.running: dict[str, TrialConfig] = {}
        self.asked = 0
        self.stopped, self.finished = "", False
        self._phase = "search"
        self._waiting: list[TrialConfig] = []  # to be trained again
        self._repeats: dict[str, list[float]] = {}  # trial -> top-1 with further seeds
        self._clock, self._start = clock, clock()
        self._replay(ledger.past)

    def next(self) -> TrialConfig | None:
        """Return the next trial and write it down; None to wait, or where all is `finished`."""
        if self.asked and not self.stopped:
            seconds = self.ledger.seconds + self._clock() - self._start
            self._stop(why_stop(self.sweep, self.asked, seconds, self.proposer.told))
        config = self._following()
        if config is not None:
            self.ledger.ask(config)
            self._begin(config)
        return config

    def end(self, trial: str, result: EpochResult | None) -> None:
        """Take the last result of a trial that ended; None if it failed."""
        config = self.running.pop(trial)
        status = "failed" if result is None else result.status
        whole = result if status == "finished" else None
        if config.origin == "dense":
            self.feedback.dense(whole)
            if whole is None:  # without it there is no front
                self.stopped = "the dense model could not be measured"
        elif not config.of:
            # Ray's scheduler stops trials that run, and some stop themselves.
            self.feedback.plan(trial, None if status == "failed" else result)
        elif config.origin == "confirm" and whole is not None and math.isfinite(whole.val_top1):
            self._repeats.setdefault(config.of, []).append(float(whole.val_top1))

    def _replay(self, events: Sequence[Event]) -> None:
        """Do again what earlier drivers did."""
        last: dict[str, EpochResult] = {}  # trial -> its latest result
        for event in events:
            match of_trial(event):
                case TrialConfig() as config:
                    if self._following() != config:
                        raise SweepError(
                            f"trial {config.trial} of {self.sweep.directory} was proposed "
                            "otherwise, by another version of this package or of Optuna; go on "
                            "with that, or start another sweep from its front (start_from)"
                        )
                    self._begin(config)
                case EpochResult() as result:
                    last[result.trial] = result
                case TrialEnd() as end:
                    self.end(end.trial, None if end.status == "failed" else last.get(end.trial))
            if event["event"] == "stopped":
                self.stopped = event["why"]

    def _begin(self, config: TrialConfig) -> None:
        self.running[config.trial] = config
        self.asked += 1

    def _following(self) -> TrialConfig | None:
        name = f"{self.asked:04d}"
        if self.asked == 0:
            return _dense_config(name)
        if not self.stopped:
            try:
                return self._proposed(name)
            except SweepFailedError as error:
                if self.asked == 1:
                    raise
                self._stop(str(error))  # what was found is trained again all the same
        while not self._waiting:
            if self.running:  # which the next phase depends on, and which may have to be resumed
                return None
            if not self._later():
                self.finished = True
                return None
            self._next_phase()
        return dataclasses.replace(self._waiting.pop(0), trial=name)

    def _proposed(self, name: str) -> TrialConfig:
        origin, proposal = self.proposer.ask(name, self.asked)
        return _config(name, origin, proposal, epochs=self.sweep.epochs)

    def _stop(self, why: str) -> None:
        if why:
            self.stopped = why
            self.ledger.stop(why)

    def _later(self) -> list[str]:
        """Return the phases that are still to come."""
        phases = ["search"]
        phases += ["confirm"] if self.sweep.confirm else []
        phases += ["final"] if self.sweep.final_epochs else []
        return phases[phases.index(self._phase) + 1 :]

    def _next_phase(self) -> None:
        """Queue what is trained again."""
        self._phase = self._later()[0]
        told = self.proposer.told
        if not told:
            return
        if self._phase == "confirm":
            margin = standard_error(max(t.top1 for t in told), self.val_images)
            self._waiting = [
                _again(t, "confirm", self.sweep.epochs, seed)
                for t in to_confirm(told, margin)
                for seed in range(1, self.sweep.confirm + 1)
            ]
        else:
            self._waiting = [
                _again(t, "final", self.sweep.final_epochs, 0)
                for t in to_train_long(told, self._repeats)
            ]


def _dense_config(name: str) -> TrialConfig:
    return TrialConfig(
        trial=name,
        origin="dense",
        plan=json.dumps(Plan().to_json()),
        learned="",
        parameters={},
        of="",
        seed=0,
        epochs=0,
        cost_ratio=1.0,
    )


def _config(
    name: str, origin: str, proposal: Proposal, epochs: int, of: str = "", seed: int = 0
) -> TrialConfig:
    return TrialConfig(
        trial=name,
        origin=origin,
        plan=json.dumps(proposal.plan.to_json()),
        learned=proposal.scores,
        parameters=dict(proposal.parameters),
        of=of,
        seed=seed,
        epochs=epochs,
        cost_ratio=proposal.cost_ratio,
    )


def _again(told: Told, origin: str, epochs: int, seed: int) -> TrialConfig:
    """Return the configuration of a plan that is trained again; its name follows."""
    return _config("", origin, told.proposal, epochs, of=told.name, seed=seed)
