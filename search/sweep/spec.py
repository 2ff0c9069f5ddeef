"""One sweep as a frozen model, checked at the door.

Imports neither torch nor Ray, so that a laptop can check and submit a sweep.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from search.sweep.milestones import milestones

METHODS = Path(__file__).resolve().parents[2] / "pruners" / "methods"
"""Folder whose files are the pruning methods; read without importing them."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
_NAME = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)


PASSWORD = re.compile(r"://[^/]*:[^/]*@")
"""What a URI with a password has in it."""


class SweepError(ValueError):
    """Something that was asked for is wrong: one line says what, where, and what would be right."""


class SweepFailedError(RuntimeError):
    """A sweep could not be brought to an end."""


class SweepInterruptedError(RuntimeError):
    """A sweep was interrupted; run again, it continues."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Part):
    """The dense model."""

    path: str | None = None  # a .safetensors file, or a directory that PrunableViT.save wrote
    name: str | None = None  # a timm model name
    pretrained: bool = True  # timm's own weights, for a name without a path
    args: dict[str, Any] = {}  # constructor arguments of the timm model
    mean: tuple[float, ...] | None = None  # per channel, where the model does not say
    std: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> ModelSpec:
        if self.path is None and self.name is None:
            raise ValueError("has neither path nor name; give a weights file or a timm model name")
        return self


class DataSpec(_Part):
    """Labelled images: Parquet files, globs, directories or URIs, in the Hugging Face schema."""

    train: str
    val: str
    test: str
    batch_size: int = Field(128, ge=1)
    eval_batch_size: int = Field(256, ge=1)
    calibration: int = Field(512, ge=1)  # training images that scores are measured on
    image_column: str = "image"
    label_column: str = "label"
    cache_dir: str | None = None  # decoded images, per node; None is the user's cache folder
    cache_gb: float = Field(8.0, ge=0.0)  # splits that are larger decoded are streamed
    teacher_gb: float = Field(8.0, ge=0.0)  # dense model's answers; if larger, it is asked live
    max_corrupt: int = Field(0, ge=0)  # images per split that may be unreadable


class StepSpec(_Part):
    """One step: a method with its options, and how the search varies it."""

    method: str
    # deviation from the method's own allocation; base and slope over depth; or a share per site
    space: Literal["residual", "tied", "layer"] = "residual"
    max_share: float = Field(0.9, gt=0.0, le=1.0)
    budgets: tuple[Share, ...] = ()  # that a method learns for; () is its option `budget`
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        """In TOML a method's options stand beside `method`; unknown ones are refused later."""
        if not isinstance(values, Mapping) or "options" in values:
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        options = {key: value for key, value in values.items() if key not in own}
        return {**own, "options": options}

    @model_validator(mode="after")
    def _method_exists(self) -> StepSpec:
        names = sorted(path.stem for path in METHODS.glob("*.py") if path.stem != "__init__")
        if self.method not in names:
            near = difflib.get_close_matches(self.method, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"names no method: {self.method!r}; {hint}there are {', '.join(names)}"
            )
        return self


class Budget(_Part):
    """Range that the cost of every trained trial lies in, as shares of the dense model's."""

    low: float
    high: float

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)):
            if len(values) != 2:
                raise ValueError("needs two numbers; give [low, high]")
            return {"low": values[0], "high": values[1]}
        return values

    @model_validator(mode="after")
    def _is_a_range(self) -> Budget:
        if not 0.0 < self.low < self.high <= 1.0:
            raise ValueError(
                f"is impossible: [{self.low}, {self.high}]; "
                "give shares of the dense cost, 0 < low < high <= 1"
            )
        return self


class FineTuneSpec(_Part):
    """How trials are fine-tuned."""

    lr: Positive = 5e-4
    weight_decay: float = Field(0.05, ge=0.0)
    warmup: Share = 0.1  # share of the steps
    label_smoothing: Share = 0.0
    clip: Positive = 1.0  # gradient norm
    distill: float = Field(0.5, ge=0.0, le=1.0)  # share of the dense model's term in the loss
    temperature: Positive = 1.0
    augment: bool = True  # random crops and flips
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    selector_lr: Positive = 1e-3  # of token selectors, which start untrained
    selector_alone: Share = 0.0  # share of the steps in which only these train, if there are any
    selector_settle: Share = 0.33  # share of the steps, at the end, in which these stay as they are


class Halving(_Part):
    """How trials that look bad are stopped early (MO-ASHA)."""

    eta: float = Field(2.0, gt=1.0, allow_inf_nan=False)  # one of so many goes on at each rung
    first: int = Field(1, ge=0)  # epochs before the first rung; 0 compares untuned models
    brackets: int = Field(1, ge=1)  # of bracket s, trials are first compared at rung s


class Constraints(_Part):
    """Bounds beside the budget; what violates one is not on the front."""

    max_params: int | None = Field(None, ge=1)  # stored parameters
    min_images_per_s: Positive | None = None  # on the trial's own device
    max_drop: Positive | None = None  # points of validation top-1 below the dense model


class Resources(_Part):
    """What each worker of a trial gets; fractions are allowed, of a GPU only to a single worker."""

    cpu: float = Field(1.0, gt=0.0)
    gpu: float = Field(0.0, ge=0.0)  # at most one; for more, give more workers
    # processes that fine-tune a trial together, on one GPU each; learning takes one
    workers: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _has_workers_for_its_gpus(self) -> Resources:
        if self.gpu > 1.0:
            raise ValueError(
                f"has gpu = {self.gpu:g}, but a process trains on one GPU; for several GPUs per "
                f"trial give as many workers: workers = {math.ceil(self.gpu) * self.workers}, "
                "gpu = 1"
            )
        if self.workers > 1 and 0.0 < self.gpu < 1.0:
            raise ValueError(
                f"has workers = {self.workers} with gpu = {self.gpu:g}, but workers of a trial do "
                "not share a GPU; give gpu = 1, or 0, or workers = 1"
            )
        return self


class Sweep(_Part):
    """One sweep."""

    name: Annotated[str, _NAME]
    model: ModelSpec
    data: DataSpec
    steps: tuple[StepSpec, ...] = Field(min_length=1)
    budget: Budget
    # what accuracy is traded against; with "latency" the budget is still one of gmacs
    cost: Literal["effective_gmacs", "gmacs", "latency"] = "effective_gmacs"
    trials: int = Field(ge=2)  # the dense model and the first plans count
    ladder: int = Field(9, ge=0)  # budgets at which the methods' own allocations are tried first
    alone: int = Field(1, ge=0)  # budgets at which each method is then tried alone
    start_from: str | None = None  # directory of an earlier sweep, whose front is tried next
    epochs: int = Field(ge=0)  # of fine-tuning, per trial
    elastic_epochs: int = Field(0, ge=0)  # of tuning the dense model for cuts, once; 0 is none
    elastic_lr: Positive = 1e-4  # gentler than finetune.lr: the dense model is to stay what it is
    seed: int = Field(0, ge=0)
    sampler: Literal["auto", "gp", "nsga2", "nsga3", "tpe", "random"] = "auto"
    refine: float = Field(0.3, ge=0.0, lt=1.0)  # share of the trials, the last, that vary by site
    halving: Halving | None = None  # None (in TOML: false) trains every trial to its end
    constraints: Constraints = Constraints()
    max_hours: Positive | None = None  # after which no trial begins
    patience: int = Field(0, ge=0)  # trials in which the hypervolume must grow; 0 does not look
    min_growth: float = Field(0.01, ge=0.0)  # share by which it must
    confirm: int = Field(0, ge=0)  # further seeds with which the front is trained again
    final_epochs: int = Field(0, ge=0)  # with which the front is trained last; 0 does not
    concurrency: int | None = Field(None, ge=1)  # trials at once; None is what the cluster holds
    finetune: FineTuneSpec = FineTuneSpec()
    resources: Resources = Resources()
    storage: str = "results"
    tracking: str | None = None  # MLflow tracking URI; None is SQLite in the sweep's directory
    register_front: bool = True  # make each member of the front a version of a registered model ...
    registered_model: Annotated[str, _NAME] | None = None  # ... of this name; None is the sweep's
    # shares of the dense cost; the best version within each gets an alias, best-under-50
    alias_budgets: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.25, 0.5, 0.75)
    max_failures: int = Field(2, ge=0)  # restarts of a trial without an epoch between them
    max_epoch_hours: Positive = 6.0  # after which an epoch (or a start) hangs: its process is ended

    @field_validator("halving", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("storage")
    @classmethod
    def _is_a_directory(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"is {value!r}; give a directory that all nodes see, no URI")
        return value

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
    def directory(self) -> Path:
        """Where everything of this sweep lies."""
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
