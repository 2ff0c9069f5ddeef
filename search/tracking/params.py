"""Parameters in MLflow: a sweep's, on its parent run, and a trial's."""

from __future__ import annotations

from statistics import fmean

from search.records.trial_record import TrialRecord
from search.sweep.spec import Sweep


def sweep_params(sweep: Sweep) -> dict[str, str]:
    """Return the parent run's parameters: model, data, steps, budget, trials."""
    data = sweep.data
    return {
        "model": str(sweep.model.path or sweep.model.name),
        "train": data.train,
        "val": data.val,
        "test": data.test,
        "steps": ", ".join(sweep.labels),
        "budget": f"{sweep.shares.low:.4g} to {sweep.shares.high:.4g}",
        "cost": sweep.cost,
        "trials": str(sweep.trials),
        "epochs": str(sweep.epochs),
        "sampler": sweep.sampler,
        "seed": str(sweep.seed),
    }


def trial_params(record: TrialRecord) -> dict[str, str]:
    """Return a trial's parameters: methods, plan, cost ratio and mean share per kind of site."""
    params = {"methods": record.methods, "origin": record.origin, "plan": record.plan_line[:500]}
    params["cost_ratio"] = f"{record.cost_ratio:.4f}"
    for step in record.plan["steps"]:
        kinds: dict[str, list[float]] = {}
        for site, share in step["thresholds"].items():
            parts = site.split(".")
            kinds.setdefault(".".join(parts[2:]) or site, []).append(share)
        for kind, shares in kinds.items():
            params[f"{step['method']}.{kind}.mean_share"] = f"{fmean(shares):.4f}"
    return params
