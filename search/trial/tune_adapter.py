"""A trial as Ray Tune runs it in one process."""

from __future__ import annotations

from typing import Any

from ray import tune

from search.records.events import TrialConfig
from search.trial.inputs import TrialInputs
from search.trial.trial import Trial
from search.trial.workers import OneWorker


class PlanTrial(tune.Trainable):
    """An actor of Ray Tune that runs one trial after another."""

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        """Prepare the actor, and begin its first trial."""
        if inputs is None:
            raise ValueError("inputs is None; give TrialInputs through tune.with_parameters")
        self.trial = Trial.first(inputs, TrialConfig.from_json(config), OneWorker())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial on the same actor."""
        self.trial = self.trial.next(TrialConfig.from_json(new_config))
        return True

    def step(self) -> dict[str, Any]:
        """Run one epoch and return its result; the last one of a trial has `done`.

        Raises:
            ToldToEndError: If the process was; the next one reports again what was saved.
        """
        return self.trial.step().to_report()
