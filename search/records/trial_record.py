"""The record of one trial, and where its model lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field

from search.records.typed import JsonObject

MODELS = "models"
"""Folder of a sweep's directory that holds a folder for each trial."""

Parameters = dict[str, float | bool | str]
"""What was sampled, by name."""

TrialName = Annotated[str, Field(pattern=r"^[0-9]{4,9}$")]
"""Name of a trial, which its folder bears."""

ModelPath = Annotated[str, Field(pattern=r"^(models/[0-9]{4,9}/epoch-[0-9]{4,9})?$")]
"""Where a trial's model lies, below the sweep's directory; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Plan and results of one trial.

    Attributes:
        trial: Number of the trial, four digits.
        name: What a person tells it apart by.
        status: "running", "finished", "stopped" (ended early), "failed", or "dense".
        reason: Why it failed, in one line.
        origin: "dense", "ladder" (the methods' own allocations), "alone" (a single method's),
            "earlier" (another sweep's front), "search", "refined" (near the front), "confirm"
            (other seeds) or "final" (longer).
        of: Trial whose plan this one trains again; empty for a plan of its own.
        seed: Which stream of images and random numbers it saw.
        parameters: What was sampled, by name.
        methods: Methods of the plan's active steps, joined by "+".
        epochs: Epochs of fine-tuning that were finished.
        spent: Epochs of fine-tuning that the sweep had spent, on all trials, when this one ended.
        cost_ratio: Cost as a share of the dense model's, as the plan predicts it.
        val_top1: Percent, after the last epoch; None before the first result. Of a member of a
            front that was confirmed, the mean of the further seeds: the first was chosen for it.
        by_class: The same of each class, of a trial that ran to its end; None for a class without
            images.
        spread: Standard deviation of top-1 over all seeds, the first included; None with one.
        runs: Number of seeds.
        within_spread: Whether the next cheaper member of the front may be as good: the difference
            is below the spread of the two.
        test_top1: Percent; only of the front's members and the dense model.
        gmacs: 1e9 multiply-adds of dense kernels.
        effective_gmacs: 1e9 multiply-adds on weights that are not zero.
        params: Stored parameters.
        density: Share of the parameters that is not masked.
        images_per_s: Measured in the trial's last evaluation.
        latency_ms: Time per image in its first one, in full batches.
        violates: Constraints of the sweep that do not hold; empty if all do.
        plan: The plan as JSON values.
        plan_line: The plan in one line.
        shape: The shape as JSON values; empty before the first result.
        seconds: Time the trial has run.
        history: Metrics of each epoch, 0 (before fine-tuning) first.
        checkpoint: Directory of the model, below the sweep's directory; empty without one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # for records that are read

    trial: TrialName
    name: str
    status: Annotated[str, Field(pattern=r"^(running|finished|stopped|failed|dense)$")]
    reason: str = ""
    origin: str
    of: str = ""
    seed: int = 0
    parameters: Parameters = field(default_factory=dict)
    methods: str
    epochs: int = 0
    spent: int = 0
    cost_ratio: float
    val_top1: float | None = None
    by_class: list[float | None] = field(default_factory=list)
    spread: float | None = None
    runs: int = 1
    within_spread: bool = False
    test_top1: float | None = None
    gmacs: float | None = None
    effective_gmacs: float | None = None
    params: int | None = None
    density: float | None = None
    images_per_s: float | None = None
    latency_ms: float | None = None
    violates: str = ""
    plan: JsonObject
    plan_line: str
    shape: JsonObject = field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: ModelPath = ""


def model_path(trial: str, epoch: int) -> str:
    """Return where the model of a trial lies after an epoch, below the sweep's directory."""
    return f"{MODELS}/{trial}/{model_name(epoch)}"


def model_name(epoch: int, steps: int = 0) -> str:
    """Return the name of the folder of a model, so many steps after an epoch; they sort by it."""
    return f"epoch-{epoch:04d}" + (f"-{steps:06d}" if steps else "")
