"""Optuna behind Ray Tune: asks for parameters, hands out plans, tells what came of them.

Ray's own `OptunaSearch` is not used: it records a stopped trial as complete with its partial values
and leaves a trial with a NaN result RUNNING for ever, which a sampler then avoids. Here every trial
that was asked for is told: COMPLETE with both objectives, PRUNED if it was stopped early, FAIL
otherwise.
"""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from search.space import OutOfReachError, Proposal, Space
from search.sweep import Sweep, SweepFailedError

OBJECTIVES = ["val_top1", "cost_ratio"]
"""What a trial is told by: the first is maximised, the second minimised."""

REFUSALS = 200
"""Proposals in a row that may be out of the budget's reach before the sweep gives up."""


class PlanSearcher(Searcher):
    """Proposes the dense model, then a ladder of uniform plans, then what Optuna asks for.

    The study lives in memory and is saved with the sweep's state; `study` may be read at any time.
    """

    def __init__(self, sweep: Sweep, space: Space) -> None:
        """Open a study and queue the ladder."""
        super().__init__()
        self.sweep, self.space = sweep, space
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self.study = optuna.create_study(
            study_name=sweep.name,
            directions=["maximize", "minimize"],
            sampler=make_sampler(sweep.sampler, sweep.seed),
        )
        self.study.set_user_attr("objectives", OBJECTIVES)
        for parameters in space.ladder():
            self.study.enqueue_trial(parameters, user_attrs={"origin": "ladder"})
        self.asked = 0
        self.running: dict[str, int] = {}  # Ray's trial id -> Optuna's trial number

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept the run; the objectives are the sweep's own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the configuration of the next trial."""
        if self.asked >= self.sweep.trials:
            return Searcher.FINISHED
        name = f"{self.asked:04d}"
        self.asked += 1
        if name == "0000":
            return {
                "trial": name,
                "origin": "dense",
                "epochs": 0,
                "plan": {"steps": []},
                "cost_ratio": 1.0,
            }
        trial, proposal = self._ask()
        self.running[trial_id] = trial.number
        return {
            "trial": name,
            "origin": trial.user_attrs.get("origin", "search"),
            "epochs": self.sweep.epochs,
            "plan": proposal.plan.to_json(),
            "learned": proposal.learned,
            "cost_ratio": proposal.cost_ratio,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what came of a trial."""
        number = self.running.pop(trial_id, None)
        if number is None:  # the dense model, or a trial told before
            return
        status = "failed" if error or result is None else result.get("status", "failed")
        if status == "finished" and result is not None:
            values = [float(result["val_top1"]), float(result["cost_ratio"])]
            if all(map(math.isfinite, values)):
                self.study.tell(number, values)
                return
        self.study.tell(number, state=TrialState.PRUNED if status == "stopped" else TrialState.FAIL)

    def save(self, checkpoint_path: str) -> None:
        """Save the study; Ray calls this with its own snapshot of the sweep."""
        Path(checkpoint_path).write_bytes(pickle.dumps((self.study, self.asked, self.running)))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from what `save` wrote."""
        self.study, self.asked, self.running = pickle.loads(Path(checkpoint_path).read_bytes())

    def export_study(self, path: Path) -> None:
        """Copy the study to a SQLite file, which optuna-dashboard opens."""
        path.unlink(missing_ok=True)
        study = optuna.create_study(
            study_name=self.study.study_name,
            directions=self.study.directions,
            storage=f"sqlite:///{path}",
        )
        study.set_user_attr("objectives", OBJECTIVES)
        study.add_trials(self.study.get_trials(deepcopy=False, states=_TOLD))

    def _ask(self) -> tuple[optuna.Trial, Proposal]:
        for _ in range(REFUSALS):
            trial = self.study.ask()
            try:
                return trial, self.space.propose(self.space.sample(trial))
            except OutOfReachError:
                self.study.tell(trial, state=TrialState.FAIL)
        raise SweepFailedError(
            f"{REFUSALS} proposals in a row were out of the budget's reach; give a wider budget"
        )


_TOLD = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Build the sampler that a sweep names."""
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)
