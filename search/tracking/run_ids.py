"""Ids of a sweep's runs in MLflow, as its directory notes them; the parent run is created here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Param
from mlflow.tracking import MlflowClient

from search.sweep.spec import Sweep
from search.sweep.toml import sweep_toml
from search.sweep.tracking_uri import artifacts_beside
from search.tracking.params import sweep_params
from search.tracking.views import view_tags

RUNS = "mlflow.jsonl"
"""File of a sweep's directory with the ids of its MLflow runs, first the sweep's, and the place in
the ledger up to which it has been logged.
"""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # metrics first, in the UI


@dataclass(frozen=True, kw_only=True)
class RunIds:
    """Ids of one sweep's runs.

    Attributes:
        experiment: Its experiment.
        parent: The sweep's own run.
        trials: Trial -> run.
        place: Place in the ledger up to which it has been logged.
    """

    experiment: str
    parent: str
    trials: dict[str, str]
    place: int

    @classmethod
    def read(cls, lines: Sequence[dict], path: Path) -> RunIds:
        """Read the lines of a file of ids, of which there is at least one.

        Raises:
            ValueError: If one lacks something.
        """
        try:
            experiment, parent = str(lines[0]["experiment"]), str(lines[0]["parent"])
            trials = {str(line["trial"]): str(line["run"]) for line in lines if "trial" in line}
            places = [int(line["place"]) for line in lines if "place" in line]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} lacks something ({error}); put back a copy of it, "
                "or move it away to log to new runs"
            ) from error
        place = max(0, places[-1]) if places else 0
        return cls(experiment=experiment, parent=parent, trials=trials, place=place)


def create_parent(client: MlflowClient, store: str, sweep: Sweep) -> dict[str, str]:
    """Create the parent run of a sweep, and its experiment if need be; return the line to note.

    Args:
        client: MLflow's client.
        store: Its tracking URI.
        sweep: The sweep.

    Raises:
        MlflowException: If MLflow refuses.
    """
    name = sweep.name
    experiment = client.get_experiment_by_name(name)
    identity = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(name, artifacts_beside(store), tags=_KIND)
    )
    for key, value in view_tags(now()).items():
        client.set_experiment_tag(identity, key, value)
    parent = client.create_run(identity, run_name=name, tags={"sweep": name}).info.run_id
    client.log_text(parent, sweep_toml(sweep), "sweep.toml")
    client.log_batch(parent, params=[Param(k, v) for k, v in sweep_params(sweep).items()])
    return {"experiment": identity, "parent": parent}


def now() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return int(time.time() * 1000)
