"""One sweep as a frozen model, checked at the door. Its tables are in `search.sweep.parts`.

Imports neither torch nor Ray, so that a laptop can check and submit a sweep.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from search.sweep.milestones import milestones
from search.sweep.parts import (
    Budget,
    Constraints,
    DataSpec,
    FineTuneSpec,
    GmacsBudget,
    Halving,
    ModelSpec,
    Part,
    Positive,
    Resources,
    StepSpec,
)

_NAME = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)


BUDGETS = ("budget", "budget_gmacs", "budget_of")
"""Keys of a sweep that give its budget, each in its own way; a sweep has one of them."""

PASSWORD = re.compile(r"://[^/]*:[^/]*@")
"""Part of a URI that holds a password."""


class SweepError(ValueError):
    """A request is wrong: one line names the key, the value, and what would be right."""


class SweepFailedError(RuntimeError):
    """A sweep could not be brought to an end."""


class SweepInterruptedError(RuntimeError):
    """A sweep was interrupted; run again, it continues."""


class Sweep(Part):
    """One sweep."""

    name: Annotated[str, _NAME]
    """Its name: of its directory below `storage`, and of its experiment in MLflow."""
    model: ModelSpec
    """The dense model."""
    data: DataSpec
    """Labelled images."""
    steps: tuple[StepSpec, ...] = Field(min_length=1)
    """Methods of a plan, in the order unit, token, weight; at most one that learns in a trial."""
    budget: Budget | None = None
    """Range that the cost of every trained trial lies in: [low, high], shares of the dense cost.
    One of the three keys of a budget is required."""
    budget_gmacs: GmacsBudget | None = None
    """The same range as 1e9 multiply-adds of an image, instead of `budget`."""
    budget_of: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    """The same range as the costs of two timm models, the cheaper first, at the size of the dense
    model's images and with its classes; of one model, from half of its cost to its cost."""
    cost: Literal["effective_gmacs", "gmacs", "latency"] = "effective_gmacs"
    """Cost that accuracy is traded against; with `latency` the budget is still one of gmacs."""
    trials: int = Field(ge=2)
    """Number of trials; the dense model and the first plans count."""
    ladder: int = Field(9, ge=0)
    """Budgets at which the methods' own allocations are tried first."""
    alone: int = Field(1, ge=0)
    """Budgets at which each method is then tried alone."""
    start_from: str | None = None
    """Directory of an earlier sweep, whose front is tried next."""
    epochs: int = Field(ge=0)
    """Epochs of fine-tuning, per trial."""
    elastic_epochs: int = Field(0, ge=0)
    """Epochs of tuning the dense model for cuts, once, before the trials; 0 is none."""
    elastic_lr: Positive = 1e-4
    """Peak learning rate of that, gentler than `finetune.lr`: the model stays a good one uncut."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    sampler: Literal["auto", "gp", "nsga2", "nsga3", "tpe", "random"] = "auto"
    """Optuna's sampler that proposes plans."""
    refine: float = Field(0.3, ge=0.0, lt=1.0)
    """Share of the trials, the last, that vary members of the front site by site."""
    halving: Halving | None = None
    """Early stopping of trials that look bad; none (in TOML: false) trains each to its end."""
    constraints: Constraints = Constraints()
    """Bounds beside the budget."""
    max_hours: Positive | None = None
    """Hours after which no trial begins."""
    patience: int = Field(0, ge=0)
    """Trials in which the hypervolume must grow, else the sweep ends; 0 does not look."""
    min_growth: float = Field(0.01, ge=0.0)
    """Share by which the hypervolume must grow within `patience` trials."""
    confirm: int = Field(0, ge=0)
    """Further seeds with which the front is trained again."""
    final_epochs: int = Field(0, ge=0)
    """Epochs for which the front is trained last; 0 leaves it as it is."""
    concurrency: int | None = Field(None, ge=1)
    """Trials at once; by default as many as the cluster holds."""
    finetune: FineTuneSpec = FineTuneSpec()
    """How trials are fine-tuned."""
    resources: Resources = Resources()
    """Resources of each worker of a trial."""
    storage: str = "results"
    """Directory of all sweeps, which every node sees."""
    tracking: str | None = None
    """MLflow tracking URI; by default a SQLite file in the sweep's directory."""
    register_front: bool = True
    """Whether each member of the front becomes a version of a registered model."""
    registered_model: Annotated[str, _NAME] | None = None
    """Name of that registered model; by default the sweep's."""
    alias_budgets: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.25, 0.5, 0.75)
    """Shares of the dense cost; the best version within each gets an alias, `best-under-50`."""
    max_failures: int = Field(2, ge=0)
    """Restarts of a trial without an epoch between them."""
    max_epoch_hours: Positive = 6.0
    """Hours after which an epoch (or a start) hangs: its process is ended."""

    @field_validator("halving", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("budget_of", mode="before")
    @classmethod
    def _of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("storage")
    @classmethod
    def _is_a_directory(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"is {value!r}; give a directory that all nodes see, no URI")
        return value

    @model_validator(mode="after")
    def _has_one_budget(self) -> Sweep:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if not given:
            raise ValueError(
                "has no budget; give budget = [0.3, 0.8], shares of the dense cost, or one of "
                f"{', '.join(BUDGETS[1:])}"
            )
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(given)}; give one of them")
        return self

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Sweep:
        """A sweep is printed, logged, and shown to all who see a job."""
        named = {"tracking": self.tracking, "model.path": self.model.path}
        named |= {f"data.{split}": getattr(self.data, split) for split in ("train", "val", "test")}
        for key, value in named.items():
            if value is not None and PASSWORD.search(value):
                raise ValueError(
                    f"has a password in {key}; give it as an environment variable, for MLflow "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                )
        return self

    @model_validator(mode="after")
    def _can_measure_speed(self) -> Sweep:
        measures = self.cost == "latency" or self.constraints.min_images_per_s is not None
        if measures and 0.0 < self.resources.gpu < 1.0:
            raise ValueError(
                f"measures speed on resources.gpu = {self.resources.gpu}, a shared GPU; give whole "
                "GPUs, or neither cost = 'latency' nor min_images_per_s"
            )
        return self

    @model_validator(mode="after")
    def _has_rungs(self) -> Sweep:
        halving = self.halving
        if halving is None:
            return self
        if halving.first >= self.epochs:
            raise ValueError(
                f"has halving.first = {halving.first} and epochs = {self.epochs}; "
                "give a first rung before the last epoch"
            )
        rungs = len(milestones(self.epochs, halving.first, halving.eta))
        if halving.brackets > rungs + 1:
            raise ValueError(
                f"has halving.brackets = {halving.brackets}, with {rungs} rungs; "
                f"give at most {rungs + 1}"
            )
        return self

    @model_validator(mode="after")
    def _trains_longer_at_last(self) -> Sweep:
        if 0 < self.final_epochs <= self.epochs:
            raise ValueError(
                f"has final_epochs = {self.final_epochs}; "
                f"give more than epochs = {self.epochs}, or 0 for none"
            )
        return self

    @property
    def shares(self) -> Budget:
        """The budget as shares of the dense cost.

        Raises:
            AssertionError: If it is an absolute one still: see `in_shares`.
        """
        if self.budget is None:
            raise AssertionError("search.run turns every budget into shares")
        return self.budget

    def in_shares(self, low: float, high: float) -> Sweep:
        """Return this sweep with its budget, which may be absolute, as shares of the dense cost."""
        budget = Budget(low=low, high=high)
        return self.model_copy(update={"budget": budget, "budget_gmacs": None, "budget_of": None})

    @property
    def directory(self) -> Path:
        """Directory of all files of this sweep."""
        return Path(self.storage) / self.name

    @property
    def model_name(self) -> str:
        """Registered model whose versions the front's members are."""
        return self.name if self.registered_model is None else self.registered_model

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each step: its method, numbered from the second of the same method on."""
        seen: Counter[str] = Counter()
        labels = []
        for step in self.steps:
            seen[step.method] += 1
            number = seen[step.method]
            labels.append(step.method if number == 1 else f"{step.method}-{number}")
        return tuple(labels)


def alias_of(budget: float) -> str:
    """Return the alias of a budget, a share of the dense cost; MLflow takes no dots in it."""
    return f"best-under-{100.0 * budget:.10g}".replace(".", "-")
