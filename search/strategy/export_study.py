"""A copy of a sweep's Optuna study that optuna-dashboard opens."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.trial import TrialState

from search.strategy.proposer import OBJECTIVES


def export_study(study: optuna.Study, path: Path) -> None:
    """Copy a study to a SQLite file, in place of an older copy.

    What was stopped is pruned there, so that it is not among the best.
    """
    path.unlink(missing_ok=True)
    copy = optuna.create_study(
        study_name=study.study_name, directions=study.directions, storage=f"sqlite:///{path}"
    )
    copy.set_user_attr("objectives", OBJECTIVES)
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))
    for trial in trials:
        if "stopped" in trial.user_attrs:
            trial.state, trial.values = TrialState.PRUNED, None
    copy.add_trials(trials)
