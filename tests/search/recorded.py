"""Trials and results as Ray hands them to a recorder."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tests.search.trial_events import config_of, result_of

PLAN = {"steps": [{"method": "magnitude", "options": {}, "thresholds": {"blocks.0.mlp.fc1": 0.5}}]}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trial_of(name: str, ratio: float = 0.5, origin: str = "search", of: str = "") -> Any:
    plan = json.dumps({"steps": []} if origin == "dense" else PLAN)
    config = config_of(name, origin=origin, epochs=1, plan=plan, cost_ratio=ratio, of=of)
    return SimpleNamespace(config=config.to_json(), trial_id=f"ray-{name}", error_file=None)


def result(trial: Any, top1: float, epoch: int = 0, status: str = "finished") -> dict[str, Any]:
    ratio = trial.config["cost_ratio"]
    found = result_of(
        trial.config["trial"],
        epoch=epoch,
        status=status,
        val_top1=top1,
        gmacs=ratio,
        effective_gmacs=ratio,
        by_class=[top1, None],
    )
    return found.to_report()


DENSE = trial_of("0000", 1.0, "dense")
