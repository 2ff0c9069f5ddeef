"""The problem that `search_quality.py` puts to all arms: a model, images, and one way to tune.

Every arm cuts the sample's ViT and tunes each cut in the same way: the images in the same order,
the same views, the same teacher and recipe as a trial of a sweep (`search.trial.trial`), of which
the sweep made here says every setting.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from anytime import Ended
from numpy.typing import NDArray
from torch import Tensor

from pruners import Plan, PrunableViT, Pruner, cost_of, load_method
from pruners.families.learned import Learned
from pruners.model.files import replace_file
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.optimisation import NonFiniteLossError
from pruners.training.recipe import Recipe
from search.data.augment import Epoch
from search.data.model import load_model
from search.data.shards import find_shards
from search.data.splits import Calibration, make_teacher, mixed_seed, open_split
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "search" / "sample"
LOW, HIGH = 0.25, 0.97  # of the dense MACs: what a plan may cost
TUNE_EPOCHS = 2  # of every cut


class SettingsError(ValueError):
    """What was asked of the benchmark cannot be."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides every number but the arm and the seed.

    Attributes:
        train: Parquet files.
        test: Parquet files that are halved into validation and test; empty for the sample's own.
        images: Training images; an epoch is a pass over them.
        epochs: Training epochs of an arm.
        out: Folder of everything that is written.
    """

    train: str
    test: str
    images: int
    epochs: int
    out: str

    @property
    def folder(self) -> Path:
        """Where what these settings measured lies, so that others cannot be mixed with it."""
        decisive = [self.train, self.test, self.images, self.epochs, LOW, HIGH, TUNE_EPOCHS]
        digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]
        return Path(self.out) / "search_quality" / f"{self.epochs}-epochs-{digest}"

    @property
    def trials(self) -> int:
        """How many cuts can be tuned."""
        return self.epochs // TUNE_EPOCHS

    def sweep(self, name: str, seed: int, *overrides: str) -> Sweep:
        """Return the sweep of an arm of this engine; its settings are those of all arms."""
        data = self.folder / "data"
        sets = [
            f"name='{name}'",
            f"seed={seed}",
            f"storage='{self.folder / 'sweeps'}'",
            f"model.path='{SAMPLE / 'vit_cifar10.safetensors'}'",
            *(f"data.{split}='{data / split}.parquet'" for split in ("train", "val", "test")),
            "steps=[{method='grouped'}, {method='tome'}]",
            "cost='gmacs'",
            f"budget=[{LOW}, {HIGH}]",
            f"trials={self.trials + 1}",  # and the dense model
            f"epochs={TUNE_EPOCHS}",
            "finetune.lr=2e-4",
            "concurrency=1",
            "register_front=false",
        ]
        return load_sweep(ROOT / "search" / "sweeps" / "sample.toml", [*sets, *overrides])

    def write_images(self) -> None:
        """Write the three splits that all arms read, unless they are there."""
        data = self.folder / "data"
        if (data / "test.parquet").exists():  # written last
            return
        data.mkdir(parents=True, exist_ok=True)
        train = _read(self.train)
        if not 64 <= self.images <= train.num_rows:
            raise SettingsError(
                f"--images is {self.images}; give 64 to {train.num_rows}, what --train holds"
            )
        rows = np.random.default_rng(0).permutation(train.num_rows)[: self.images]
        _write(train, np.sort(rows), data / "train.parquet")
        if self.test:
            both = _read(self.test)
            halves = {"val": (both, 0, 2), "test": (both, 1, 2)}
        else:
            halves = {s: (_read(str(SAMPLE / f"{s}.parquet")), 0, 1) for s in ("val", "test")}
        for split, (table, first, step) in halves.items():
            _write(table, np.arange(first, table.num_rows, step), data / f"{split}.parquet")


class Bench:
    """The model and the images of a sweep, opened in this process on one thread."""

    def __init__(self, sweep: Sweep) -> None:
        torch.set_num_threads(1)
        device = torch.device("cpu")
        self.sweep = sweep
        self.dense = load_model(sweep.model).eval().requires_grad_(False)
        self.dense.use_fused_attention(False)
        self.train, self.val = (open_split(sweep, self.dense, s) for s in ("train", "val"))
        self.calibration = Calibration(sweep, self.train, device)
        self.teacher = make_teacher(sweep, self.dense, self.train, device)
        self.shape = self.dense.shape()
        self.dense_macs = cost_of(self.shape).macs
        self._scored: dict[Pruner, Learned] = {}

    def copy(self) -> PrunableViT:
        """Return a dense model to cut."""
        return copy.deepcopy(self.dense).requires_grad_(True)

    def ratio(self, plan: Plan) -> float:
        """Return a plan's MACs as a share of the dense model's."""
        return cost_of(plan.shape(self.shape)).macs / self.dense_macs

    def scored(self, pruner: Pruner) -> Learned:
        """Return a method's scores of the dense model, measured once."""
        if pruner not in self._scored:
            scores = pruner.score(self.copy(), self.calibration)
            self._scored[pruner] = Learned(scores=scores)
        return self._scored[pruner]

    def cut(self, plan: Plan) -> PrunableViT:
        """Return the model that a plan leaves, untuned."""
        vit = self.copy()
        first = next((step.pruner for step in plan.steps if step.active), None)
        scores = self.scored(first) if first is not None and first.family == "unit" else None
        plan.apply(vit, self.calibration, scores)
        return vit

    def top1(self, vit: PrunableViT) -> float:
        """Return validation top-1 in percent."""
        batch = self.sweep.data.eval_batch_size
        return evaluate(vit, self.val.batches(batch, seed=None, augment=False)).top1

    def tried(self, number: int, what: str, cost: float, make: Callable[[], PrunableViT]) -> Ended:
        """Make a cut model, measure it, tune it and measure it again.

        Args:
            number: Its place in the order of its arm.
            what: What it is.
            cost: MACs as a share of the dense model's.
            make: Cuts a model.
        """
        start = time.perf_counter()
        vit = make()
        untuned = self.top1(vit)
        cut = time.perf_counter()
        epochs, top1 = self.tune(vit)
        return Ended(
            number=number,
            what=what,
            cost=cost,
            epochs=epochs,
            top1=top1,
            untuned=untuned,
            before_s=cut - start,
            train_s=time.perf_counter() - cut,
        )

    def tune(self, vit: PrunableViT) -> tuple[int, float | None]:
        """Tune a cut model; return its epochs and top-1, None if the loss did not stay finite."""
        sweep = self.sweep
        steps = max(1, len(self.train) // sweep.data.batch_size)
        recipe = Recipe(epochs=sweep.epochs, **sweep.finetune.model_dump(exclude={"augment"}))
        tuner = FineTuner(vit, recipe, steps)
        for epoch in range(1, sweep.epochs + 1):
            try:
                tuner.train_taught(self._taught(epoch))
            except NonFiniteLossError:
                return epoch, None
        return sweep.epochs, self.top1(vit)

    def _taught(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images, labels and the teacher's logits, as a sweep's trials see them."""
        stream = Epoch(mixed_seed(self.sweep.seed, 0), epoch)
        answers = self.teacher.answers(stream)
        batch = self.sweep.data.batch_size
        for images, labels, rows in self.train.numbered(batch, order=stream, views=stream):
            yield images, labels, torch.from_numpy(answers[rows])


def units() -> Pruner:
    """The unit method of all arms but Torch-Pruning's and the curvature's."""
    return load_method("grouped")


def tokens() -> Pruner:
    return load_method("tome")


def _read(source: str) -> pa.Table:
    shards = find_shards(source)
    tables = [pq.read_table(path, filesystem=shards.filesystem) for path in shards.paths]
    return pa.concat_tables(tables)


def _write(table: pa.Table, rows: NDArray[np.int64], path: Path) -> None:
    part = table.take(pa.array(rows))
    replace_file(path, lambda temporary: pq.write_table(part, temporary))
