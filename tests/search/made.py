"""The MLflow model of one trial, made for real."""

from __future__ import annotations

from dataclasses import dataclass

from pruners import PrunableViT
from search.records.trial_record import TrialRecord
from search.sweep.spec import Sweep
from search.tracking.served import Served


@dataclass(frozen=True, kw_only=True)
class Made:
    """The MLflow model of one trial, made for real, and what it was made of."""

    sweep: Sweep
    member: TrialRecord
    vit: PrunableViT
    served: Served
