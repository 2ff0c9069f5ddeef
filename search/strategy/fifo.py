"""Ray Tune's own order of trials, first come, first served, whatever their number."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler


class InOrder(FIFOScheduler):
    """Starts trials in the order in which they were handed out.

    Ray asks for the next one after every event, and its own `FIFOScheduler` goes through all trials
    to find it, those of the whole sweep that have ended included.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the first trial that waits to be started, one that was paused last; or none."""
        live = tune_controller.get_live_trials()
        return min(
            (trial for trial in live if trial.status in (Trial.PENDING, Trial.PAUSED)),
            key=lambda trial: (trial.status == Trial.PAUSED, trial.config["trial"]),
            default=None,
        )
