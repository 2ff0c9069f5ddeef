"""MO-ASHA for Ray Tune: stops trials that are not among the best of their cost at a rung.

Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934) in its stopping variant, for two
objectives (Schmucker et al., 2021, arXiv:2106.12639). Who is among the best is decided in
`search.strategy.rungs`; here is what Ray calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from ray.tune.experiment import Trial

from search.records.events import EpochResult, Event, TrialConfig, TrialEnd, of_trial
from search.strategy.fifo import InOrder
from search.strategy.rungs import Floats, bracket_of, bracket_weights, within_band
from search.sweep.milestones import milestones

NEVER_STOPPED = ("dense", "ladder", "confirm", "final")
"""Origins of trials that run to their end; they are not compared with any other either.

The ladder's are already chosen well, each for a budget of its own: among them a rung would stop the
very plans that the search has to beat, and against them nearly all others.
"""


class Rung:
    """Results of one epoch in one bracket.

    Attributes:
        passed: Trial -> whether it was let on, in the order in which they came.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.passed: dict[str, bool] = {}
        self._places: dict[str, int] = {}
        self._values = np.empty((2, 16))  # costs and top-1, with room for more

    def add(self, trial: str, cost: float, top1: float, *, passed: bool) -> None:
        """Take the result of a trial that has none here."""
        place = len(self.passed)
        if place == self._values.shape[1]:  # twice the room, so that adding costs the same always
            self._values = np.concatenate([self._values, np.empty_like(self._values)], axis=1)
        self._values[:, place] = cost, top1
        self.passed[trial], self._places[trial] = passed, place

    def counted(self, failed: Set[str], cost: float, top1: float) -> tuple[Floats, Floats]:
        """Return costs and top-1 of all but failed trials, and of one more that comes last."""
        values = self._values[:, : len(self.passed)]
        out = [self._places[trial] for trial in failed if trial in self._places]
        costs, top1s = np.append(np.delete(values, out, axis=1), [[cost], [top1]], axis=1)
        return costs, top1s


class MoAsha(InOrder):
    """Lets a trial go on past a rung if it is among the best 1/eta there.

    A trial's bracket follows from its name alone. Brackets share no rung: later ones hedge against
    early results that mislead, so their trials must not compete with survivors of these.

    What was decided stands: a trial that comes to a rung again, because its process died or the
    sweep was resumed, hears what it heard before. What earlier drivers decided follows from the
    sweep's ledger (`replay`): results are compared in the order in which they came.
    """

    def __init__(self, *, epochs: int, first: int, eta: float, brackets: int) -> None:
        """Set the rungs.

        Args:
            epochs: Full length of a trial.
            first: Epoch of the first rung; 0 is before fine-tuning.
            eta: One in eta goes on; each rung is eta times as long as the one before.
            brackets: Bracket s leaves out the first s rungs.

        Raises:
            ValueError: If a value is out of range.
        """
        super().__init__()
        self.eta = eta
        self.milestones = milestones(epochs, first, eta)
        self.weights = bracket_weights(len(self.milestones), eta, brackets)
        self.rungs = {
            (bracket, epoch): Rung()
            for bracket in range(brackets)
            for epoch in self.milestones[bracket:]
        }
        self.failed: set[str] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept the run if it names no objective of its own: the two are known here."""
        return metric is None and mode is None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Count a trial's results again if it failed and is to run once more.

        Ray calls this also for trials of a resumed sweep that have ended.
        """
        if trial.status == Trial.PENDING:
            self.failed.discard(trial.config["trial"])

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Count a trial no more; Ray adds it again if it has restarts left."""
        self.failed.add(trial.config["trial"])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop a trial or let it go on.

        Raises:
            ValueError: If a value that is needed is missing, or not finite in a running trial.
        """
        config = TrialConfig.from_json(trial.config)
        if config.origin in NEVER_STOPPED:
            return self.CONTINUE
        return self.CONTINUE if self.continues(EpochResult.from_report(result)) else self.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Count a trial no more if it ended because it failed."""
        if result.get("status") == "failed":
            self.failed.add(trial.config["trial"])

    def debug_string(self) -> str:
        """Return the rungs in a line: how many came, and how many of them went on."""
        rungs = [
            f"{bracket}/{epoch}: {sum(rung.passed.values())} of {len(rung.passed)}"
            for (bracket, epoch), rung in self.rungs.items()
        ]
        return (
            f"MO-ASHA, bracket/epoch: {', '.join(rungs) or 'no rungs'}; {len(self.failed)} failed"
        )

    def replay(self, events: Sequence[Event]) -> None:
        """Decide again what earlier drivers decided."""
        origins: dict[str, str] = {}  # trial -> where its plan comes from
        for event in events:
            match of_trial(event):
                case TrialConfig() as config:
                    origins[config.trial] = config.origin
                case EpochResult() as result if origins[result.trial] not in NEVER_STOPPED:
                    self.continues(result)
                case TrialEnd(status="failed") as end:
                    self.failed.add(end.trial)

    def continues(self, result: EpochResult) -> bool:
        """Decide whether a trial that may be stopped at all goes on after an epoch.

        Raises:
            ValueError: If a value that is needed is not finite in a running trial.
        """
        check_result(result)
        if result.status == "failed":
            self.failed.add(result.trial)
        return result.done or self._passes(result)  # what has ended needs no stop

    def _passes(self, result: EpochResult) -> bool:
        """Whether a trial goes on; at a rung, its result is recorded the first time it comes."""
        name, bracket = result.trial, bracket_of(int(result.trial), self.weights)
        rung = self.rungs.get((bracket, result.epoch))
        if rung is not None and name not in rung.passed:
            cost, top1 = float(result.cost_ratio), float(result.val_top1)
            costs, top1s = rung.counted(self.failed, cost, top1)
            passed = within_band(costs, top1s, len(costs) - 1, self.eta)
            rung.add(name, cost, top1, passed=passed)
        # A trial may come past the rung that stopped it: Ray forgets a stop that it has not carried
        # out when a process dies, and what the trial saved may be of that very epoch.
        return all(
            self.rungs[bracket, epoch].passed.get(name, True)
            for epoch in self.milestones[bracket:]
            if epoch <= result.epoch
        )


def check_result(result: EpochResult) -> None:
    """Check that the result of a running trial can be compared with others.

    Raises:
        ValueError: If a value that is needed is not finite, or a cost not above 0.
    """
    if result.done:
        return
    for key in ("epoch", "cost_ratio", "val_top1"):
        if not math.isfinite(value := getattr(result, key)):
            raise ValueError(
                f"{key} of trial {result.trial} is {value} after epoch {result.epoch}; "
                "report a finite number, or the trial as failed"
            )
    if result.cost_ratio <= 0:
        raise ValueError(
            f"cost_ratio of trial {result.trial} is {result.cost_ratio}; "
            "report a share of the dense model's cost, above 0"
        )
