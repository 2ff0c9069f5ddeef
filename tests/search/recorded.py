"""Trials and results as Ray hands them to a recorder."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from search.records.ledger import METRICS

PLAN = {"steps": [{"method": "magnitude", "options": {}, "thresholds": {"blocks.0.mlp.fc1": 0.5}}]}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trial_of(name: str, ratio: float = 0.5, origin: str = "search", of: str = "") -> Any:
    config = {
        "trial": name,
        "origin": origin,
        "epochs": 1,
        "plan": json.dumps({"steps": []} if origin == "dense" else PLAN),
        "cost_ratio": ratio,
        "parameters": {"budget": ratio},
        "of": of,
        "seed": 0,
    }
    return SimpleNamespace(config=config, trial_id=f"ray-{name}", error_file=None)


def result(trial: Any, top1: float, epoch: int = 0, status: str = "finished") -> dict[str, Any]:
    ratio = trial.config["cost_ratio"]
    return {
        **dict.fromkeys(METRICS, 1.0),
        "trial": trial.config["trial"],
        "epoch": epoch,
        "status": status,
        "reason": "",
        "val_top1": top1,
        "gmacs": ratio,
        "effective_gmacs": ratio,
        "params": 1000,
        "shape": json.dumps({"blocks": []}),
        "by_class": [top1, None],
    }


DENSE = trial_of("0000", 1.0, "dense")
