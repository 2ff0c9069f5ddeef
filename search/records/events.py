"""Events of a trial: its configuration, the result of an epoch, its end.

Each has one form in JSON, which a line of the ledger holds: the type's fields by their names. Ray
Tune, and a trial's own `results.json`, take a result with `done` beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from search.records.trial_record import Parameters, TrialName
from search.records.typed import JsonObject, typed

Event = JsonObject
"""A line of the ledger, as JSON values: its kind as `event`, `time`, and what belongs to it."""

EpochStatus = Annotated[str, Field(pattern=r"^(running|finished|stopped|failed)$")]
"""A trial's status after an epoch: it is to be continued, or has ended in one of three ways."""

EndStatus = Annotated[str, Field(pattern=r"^(dense|finished|stopped|failed)$")]
"""How a trial ended; "dense" is the dense model's only end that serves."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Configuration of a trial.

    Attributes:
        trial: Its number, four digits.
        origin: Where its plan comes from, as of `TrialRecord`.
        plan: The plan as JSON text: Ray keeps it with each result, where text takes less.
        learned: File of the scores that a step of the plan learned; empty without.
        parameters: What was sampled, by name.
        of: Trial whose plan this one trains again; empty for a plan of its own.
        seed: Which stream of images and random numbers it sees.
        epochs: Full length, in epochs of fine-tuning.
        cost_ratio: Cost as a share of the dense model's, as the plan predicts it.
        parts: How many parts each batch is passed in, for want of memory. The ledger has none but
            1, which is left out of JSON: it says how a trial is run, not which one it is.
    """

    __pydantic_config__ = _STRICT

    trial: TrialName
    origin: str
    plan: str
    learned: str
    parameters: Parameters
    of: str
    seed: int
    epochs: int
    cost_ratio: float
    parts: Annotated[int, Field(ge=1)] = 1

    def to_json(self) -> JsonObject:
        """Return the JSON values, which Ray Tune takes as a trial's configuration."""
        values = dataclasses.asdict(self)
        if self.parts == 1:
            del values["parts"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Read what `to_json` returned.

        Raises:
            ValueError: If it is something else, in one line.
        """
        return typed(_CONFIG, values)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Measurements of a trial after an epoch.

    Attributes:
        val_top1: Percent.
        val_loss: Mean cross-entropy.
        train_loss: Mean loss of the epoch; 0 before fine-tuning. Not finite where that failed.
        gmacs: 1e9 multiply-adds of dense kernels.
        effective_gmacs: 1e9 multiply-adds on weights that are not zero.
        cost_ratio: As the configuration has it.
        params: Stored parameters.
        density: Share of the parameters that is not masked.
        images_per_s: Measured in this evaluation.
        latency_ms: Time per image in the first one, in full batches.
        seconds: Time the trial has run.
    """

    val_top1: float
    val_loss: float
    train_loss: float
    gmacs: float
    effective_gmacs: float
    cost_ratio: float
    params: int
    density: float
    images_per_s: float
    latency_ms: float
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return them by name."""
        return {key: float(getattr(self, key)) for key in METRICS}

    def finite(self) -> dict[str, float]:
        """Return those that are finite."""
        return {key: value for key, value in self.metrics().items() if math.isfinite(value)}


METRICS = tuple(metric.name for metric in fields(Metrics))
"""Names of the metrics."""


@dataclass(frozen=True, kw_only=True)
class EpochResult(Metrics):
    """Result of an epoch of a trial; epoch 0 is the cut, measured before fine-tuning.

    Attributes:
        trial: The trial.
        epoch: Epochs of fine-tuning so far.
        status: "running", or how the trial has ended by itself.
        reason: Why it failed or was stopped, in one line.
        shape: What is left of the model, a `ViTShape` as JSON text.
        by_class: Top-1 of each class, of a trial's last epoch; None for a class without images.
    """

    __pydantic_config__ = _STRICT

    trial: TrialName
    epoch: int
    status: EpochStatus
    reason: str
    shape: str
    by_class: list[float | None]

    @property
    def done(self) -> bool:
        """Whether it is the trial's last."""
        return self.status != "running"

    def to_json(self) -> JsonObject:
        """Return the JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EpochResult:
        """Read what `to_json` returned.

        Raises:
            ValueError: If it is something else, in one line.
        """
        return typed(_RESULT, values)

    def to_report(self) -> JsonObject:
        """Return the JSON values that Ray Tune takes and `results.json` keeps."""
        return {**self.to_json(), "done": self.done}

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> EpochResult:
        """Read the result from a report that Ray Tune hands on, with keys of its own.

        Raises:
            ValueError: If a key is missing.
        """
        names = [of.name for of in fields(cls)]
        if absent := [name for name in names if name not in report]:
            trial = report.get("trial", "unknown")
            raise ValueError(
                f"a result of trial {trial} has no {absent[0]}; report it after every epoch"
            )
        return cls(**{name: report[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """End of a trial, and the front after it.

    Attributes:
        trial: The trial.
        status: How it ended.
        reason: Why it failed or was stopped, in one line.
        count: Trials that have ended, this one included.
        hypervolume: Of the front; None before the dense model is measured.
        front_size: Members of the front.
    """

    __pydantic_config__ = _STRICT

    trial: TrialName
    status: EndStatus
    reason: str
    count: int
    hypervolume: float | None
    front_size: int

    def to_json(self) -> JsonObject:
        """Return the JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrialEnd:
        """Read what `to_json` returned.

        Raises:
            ValueError: If it is something else, in one line.
        """
        return typed(_END, values)


_CONFIG, _RESULT, _END = TypeAdapter(TrialConfig), TypeAdapter(EpochResult), TypeAdapter(TrialEnd)


def of_trial(event: Event) -> TrialConfig | EpochResult | TrialEnd | None:
    """Read the event of a trial from a line of the ledger; None if it is about the sweep.

    Raises:
        ValueError: If it is not what was written, in one line.
        KeyError: If it lacks the part that its kind has.
    """
    match event["event"]:
        case "asked":
            return TrialConfig.from_json(event["config"])
        case "epoch":
            return EpochResult.from_json(event["result"])
        case "ended":
            return TrialEnd.from_json(
                {k: v for k, v in event.items() if k not in ("event", "time")}
            )
    return None
