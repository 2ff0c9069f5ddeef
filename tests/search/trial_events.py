"""Whole configurations and results of trials, for tests that care about a few of their fields."""

from __future__ import annotations

from typing import Any

from search.records.events import EpochResult, TrialConfig


def config_of(trial: str = "0007", **fields: Any) -> TrialConfig:
    """A configuration, of an empty plan unless said otherwise."""
    whole: dict[str, Any] = {
        "trial": trial,
        "origin": "search",
        "plan": '{"steps": []}',
        "learned": "",
        "parameters": {"budget": 0.5},
        "of": "",
        "seed": 0,
        "epochs": 3,
        "cost_ratio": 0.5,
    }
    return TrialConfig(**whole | fields)


def result_of(trial: str = "0007", **fields: Any) -> EpochResult:
    """A result of its first epoch, unless said otherwise."""
    whole: dict[str, Any] = {
        "trial": trial,
        "epoch": 0,
        "status": "running",
        "reason": "",
        "val_top1": 50.0,
        "val_loss": 1.0,
        "train_loss": 1.0,
        "gmacs": 1.0,
        "effective_gmacs": 1.0,
        "cost_ratio": 0.5,
        "params": 1000,
        "density": 1.0,
        "images_per_s": 100.0,
        "latency_ms": 1.0,
        "seconds": 1.0,
        "shape": '{"blocks": []}',
        "by_class": [],
    }
    return EpochResult(**whole | fields)
