"""Trials that report what `PlanTrial` reports, made up: nothing is trained or evaluated."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from ray import tune

from pruners import Plan, ViTShape, cost_of
from search.trial.inputs import TrialInputs

FAILED = 0.02
"""Share of the trials whose loss is not a number in the end."""

CLASSES = 10


def made_up(config: dict[str, Any], dense: ViTShape, epoch: int) -> dict[str, Any]:
    """Return the result of a trial's epoch, with the shape and cost that its plan really has."""
    rng = np.random.default_rng(int(config["trial"]))
    talent, fails = rng.normal(0.0, 2.0), rng.random() < FAILED and config["origin"] != "dense"
    shape = Plan.from_json(json.loads(config["plan"])).shape(dense)
    cost = cost_of(shape)
    last = epoch >= config["epochs"]
    status = "running" if not last else "failed" if fails else "finished"
    top1 = 80.0 * (1.0 - math.exp(-5.0 * config["cost_ratio"])) - 20.0 / (2.0 + epoch) + talent
    return {
        "trial": config["trial"],
        "epoch": epoch,
        "status": status,
        "reason": f"epoch {epoch}: loss is nan" if status == "failed" else "",
        "val_top1": top1,
        "val_loss": 4.6 - top1 / 20.0,
        "train_loss": 4.5 - top1 / 20.0 if epoch else 0.0,
        "cost_ratio": config["cost_ratio"],
        "gmacs": cost.gmacs,
        "effective_gmacs": cost.effective_gmacs,
        "params": cost.params,
        "density": cost.density,
        "images_per_s": 1000.0 / config["cost_ratio"],
        "latency_ms": config["cost_ratio"],
        "seconds": float(epoch),
        "shape": json.dumps(shape.to_json()),
        "by_class": list(top1 + rng.normal(0.0, 3.0, CLASSES)) if status != "running" else [],
        "done": status != "running",
    }


class SimulatedTrial(tune.Trainable):
    """Stands in for `PlanTrial`; it saves nothing."""

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        assert inputs is not None
        self.dense = inputs.dense.shape()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config, self.epoch = new_config, -1
        return True

    def step(self) -> dict[str, Any]:
        self.epoch += 1
        return made_up(self.config, self.dense, self.epoch)
