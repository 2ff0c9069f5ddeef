"""The phases of a sweep behind Ray Tune's interface of a searcher.

Ray's own `OptunaSearch` is not used: it cannot tell a stopped trial from a finished one, and leaves
a trial with a NaN result RUNNING for ever, which a sampler then avoids. Here every trial that was
asked for is told: COMPLETE with both objectives (of a stopped one, those it had reached), or FAIL.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from search.records.events import EpochResult, TrialConfig
from search.records.ledger import Ledger
from search.space.space import Space
from search.space.step import Parameters
from search.strategy.phases import Phases
from search.sweep.spec import Sweep


class PlanSearcher(Searcher):
    """Hands out the trials of a sweep to Ray Tune, and takes their last results.

    What was running when an earlier driver died is handed out again first.

    Attributes:
        phases: Which trial comes next.
        configs: Ray's trial id -> what runs under it.
        interrupted: What is to be handed out again.
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
        """Start a search, or resume one.

        Args:
            sweep: The sweep.
            space: Its space.
            ledger: The sweep's.
            earlier: Parameters of an earlier sweep's front.
            val_images: Images that top-1 is measured on, which decides what a near miss is.
            clock: Seconds.

        Raises:
            SweepError: If the ledger says that something else was proposed.
        """
        super().__init__()
        self.phases = Phases(
            sweep, space, ledger, earlier=earlier, val_images=val_images, clock=clock
        )
        self.configs: dict[str, TrialConfig] = {}
        self.interrupted = list(self.phases.running.values())

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept the run; the objectives are the sweep's own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the configuration of the next trial, None to wait, or that there are no more."""
        config = self.interrupted.pop(0) if self.interrupted else self.phases.next()
        if config is None:
            return Searcher.FINISHED if self.phases.finished else None
        self.configs[trial_id] = config
        return config.to_json()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take a trial's last result; whether one whose process failed is resumed is said later."""
        if error or trial_id not in self.configs:  # told before
            return
        last = EpochResult.from_report(result) if result and "status" in result else None
        self.phases.end(self.configs.pop(trial_id).trial, last)

    def hand_out_again(self, trial_id: str, parts: int) -> None:
        """Let a trial whose process failed be resumed, with batches in so many parts."""
        self.interrupted.append(dataclasses.replace(self.configs.pop(trial_id), parts=parts))

    def give_up(self, trial_id: str) -> None:
        """Take a trial as failed."""
        self.phases.end(self.configs.pop(trial_id).trial, None)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: Ray's snapshots are not used, the ledger holds the search."""
