"""Records of trials that never ran."""

from __future__ import annotations

from search.records.trial_record import TrialRecord


def record(
    trial: str, cost: float, top1: float | None, status: str = "finished", **more
) -> TrialRecord:
    values = {
        "trial": trial,
        "name": f"{trial} grouped {cost:.2f}x",
        "status": status,
        "origin": "search",
        "methods": "grouped",
        "epochs": 2,
        "cost_ratio": cost,
        "val_top1": top1,
        "gmacs": 2 * cost,
        "effective_gmacs": cost,
        "params": 1000,
        "density": 0.5,
        "images_per_s": 12.5,
        "plan": {
            "steps": [
                {"method": "grouped", "options": {}, "thresholds": {"blocks.0.mlp.neuron": 0.5}}
            ]
        },
        "plan_line": "grouped: neurons -50 %",
        "shape": {"dim": 8, "blocks": [], "nonzero": {}},
        "seconds": 3.5,
        "history": [{"epoch": 0, "val_top1": 50.0}, {"epoch": 1, "val_top1": 60.0}],
        "checkpoint": f"models/{trial}/epoch-0001",
    }
    return TrialRecord(**{**values, **more})


DENSE = record("0000", 1.0, 80.0, "dense", origin="dense", methods="dense")
