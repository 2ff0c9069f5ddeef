"""Parts of a sweep: each table of its TOML file as a frozen model, checked at the door.

Imports neither torch nor Ray, so that a laptop can check and submit a sweep. The docstring of a
field is its description in the reference of all keys (`model_fields[...].description`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

METHODS = Path(__file__).resolve().parents[2] / "pruners" / "methods"
"""Folder whose files are the pruning methods; read without importing them."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Part(BaseModel):
    """A table: values do not change, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSpec(Part):
    """The dense model."""

    path: str | None = None
    """Its weights: a .safetensors file, or a directory that `PrunableViT.save` wrote."""
    name: str | None = None
    """A timm model name; needed where `path` is a file of weights alone, or not given."""
    pretrained: bool = True
    """Whether to load timm's own weights, for a `name` without a `path`."""
    args: dict[str, Any] = {}
    """Constructor arguments of the timm model."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, where the model does not say how images are normalized."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation of each channel, where the model does not say."""
    rotate: bool = False
    """Whether to turn its residual stream to its principal directions first: it computes the same,
    with RMSNorm for LayerNorm, and loses far less where `width` is cut."""

    @model_validator(mode="after")
    def _has_a_source(self) -> ModelSpec:
        if self.path is None and self.name is None:
            raise ValueError("has neither path nor name; give a weights file or a timm model name")
        return self


class DataSpec(Part):
    """Labelled images: Parquet files, globs, directories or URIs, in the Hugging Face schema."""

    train: str
    """Training images, which methods score and learn on and trials are fine-tuned on."""
    val: str
    """Validation images, by which the search compares trials."""
    test: str
    """Test images; only the dense model and the final front are measured on them."""
    batch_size: int = Field(128, ge=1)
    """Training images per step, of all workers of a trial together."""
    eval_batch_size: int = Field(256, ge=1)
    """Images per batch of an evaluation."""
    calibration: int = Field(512, ge=1)
    """Training images that scores are measured on."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str = "label"
    """Column of the labels."""
    cache_dir: str | None = None
    """Folder for decoded images, per node; by default in the user's cache folder."""
    cache_gb: float = Field(8.0, ge=0.0)
    """Largest decoded split, in GB, that is cached; larger ones are decoded as they are read."""
    teacher_gb: float = Field(8.0, ge=0.0)
    """Room for the dense model's answers per node, in GB; what does not fit is evaluated live."""
    max_corrupt: int = Field(0, ge=0)
    """Images per split that may be unreadable."""


class StepSpec(Part):
    """One step: a method with its options, and how the search varies it."""

    method: str
    """Name of the pruning method."""
    space: Literal["residual", "tied", "layer"] = "residual"
    """How shares vary: `residual` deviates from the method's own layer-wise allocation, `tied`
    samples a base and a slope over depth, `layer` a share per site."""
    max_share: float = Field(0.9, gt=0.0, le=1.0)
    """Largest share of a site that may go; 1 only for methods that can remove a site whole."""
    budgets: tuple[Share, ...] = ()
    """Budgets that a learned method learns for, one run each; by default its option `budget`."""
    options: dict[str, Any] = {}
    """The method's own options; in TOML they stand beside `method`."""

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


class Range(Part):
    """Two numbers, in TOML a list: [low, high]."""

    low: float
    """Lowest cost."""
    high: float
    """Highest cost."""

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)):
            if len(values) != 2:
                raise ValueError("needs two numbers; give [low, high]")
            return {"low": values[0], "high": values[1]}
        return values


class Budget(Range):
    """Range that the cost of every trained trial lies in, as shares of the dense model's."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Budget:
        if not 0.0 < self.low < self.high <= 1.0:
            raise ValueError(
                f"is impossible: [{self.low}, {self.high}]; "
                "give shares of the dense cost, 0 < low < high <= 1"
            )
        return self


class GmacsBudget(Range):
    """The same range in 1e9 multiply-adds."""

    @model_validator(mode="after")
    def _is_a_range(self) -> GmacsBudget:
        if not 0.0 < self.low < self.high < math.inf:
            raise ValueError(
                f"is impossible: [{self.low}, {self.high}]; "
                "give 1e9 multiply-adds of an image, 0 < low < high"
            )
        return self


class FineTuneSpec(Part):
    """How trials are fine-tuned."""

    lr: Positive = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.05, ge=0.0)
    """Weight decay of AdamW; norms and biases are not decayed."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises; after it, the rate falls as a cosine."""
    label_smoothing: Share = 0.0
    """Label smoothing of the cross-entropy."""
    clip: Positive = 1.0
    """Norm to which gradients are clipped."""
    distill: float = Field(0.5, ge=0.0, le=1.0)
    """Share of the dense model's term in the loss (distillation)."""
    temperature: Positive = 1.0
    """Temperature of the distillation."""
    augment: bool = True
    """Whether training images are cropped and flipped at random."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the training; `auto` is bfloat16 on hardware that gains by it, else float32."""
    selector_lr: Positive = 1e-3
    """Peak learning rate of token selectors, which start untrained."""
    selector_alone: Share = 0.0
    """Share of the steps, at the start, in which only token selectors train, if there are any."""
    selector_settle: Share = 0.33
    """Share of the steps, at the end, in which token selectors stay as they are."""


class Halving(Part):
    """How trials that look bad are stopped early (MO-ASHA)."""

    eta: float = Field(2.0, gt=1.0, allow_inf_nan=False)
    """One trial of so many goes on at each rung."""
    first: int = Field(1, ge=0)
    """Epochs before the first rung; 0 compares untuned models."""
    brackets: int = Field(1, ge=1)
    """Number of brackets; trials of bracket s are first compared at rung s."""


class Constraints(Part):
    """Bounds beside the budget; a trial that violates one is not on the front."""

    max_params: int | None = Field(None, ge=1)
    """Most stored parameters."""
    min_images_per_s: Positive | None = None
    """Least throughput, measured on the trial's own device."""
    max_drop: Positive | None = None
    """Most points of validation top-1 below the dense model."""


class Resources(Part):
    """Resources of each worker of a trial; a fraction of a GPU is for a single worker only."""

    cpu: float = Field(1.0, gt=0.0)
    """CPUs."""
    gpu: float = Field(0.0, ge=0.0)
    """GPUs, at most one; for more, give more workers."""
    workers: int = Field(1, ge=1)
    """Processes that fine-tune a trial together, on one GPU each; learning takes one."""

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
