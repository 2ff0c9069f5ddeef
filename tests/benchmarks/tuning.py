"""What the benchmarks share that cut the sample's ViT and fine-tune it, the same way each time."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from pruners import Plan, PrunableViT, Step, ViTShape, cost_of, load_method
from pruners.families.unit import UnitPruner
from pruners.model.files import replace_file
from pruners.model.types import Scores
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe
from search.data.decode import ImageSpec
from search.data.images import Images, open_images
from search.data.teacher import weights_digest

SAMPLE = Path(__file__).parents[2] / "search" / "sample"
SPEC = ImageSpec(
    size=(32, 32), channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
BATCH = 64
TEACHER = Path(tempfile.gettempdir()) / "prunefront-teacher"
"""Folder of the dense model's logits."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Images, and how long to train.

    Attributes:
        train: Parquet files.
        val: Parquet files; empty if the images of `test` are to be halved.
        test: Parquet files.
        images: Training images of an epoch, other ones each time.
        epochs: Epochs of fine-tuning.
    """

    train: str
    val: str
    test: str
    images: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.images // BATCH

    def training_images(self) -> Images:
        return open_images(self.train, SPEC)

    def evaluation_images(self) -> tuple[list[Tensor], list[Tensor]]:
        """Images and labels of validation and of test."""
        if self.val:
            return _whole(self.val), _whole(self.test)
        both = _whole(self.test)
        return [t[0::2] for t in both], [t[1::2] for t in both]

    def epoch(self, train: Images, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(train.batches(BATCH, seed=seed, augment=True), self.steps)

    def taught_epoch(
        self, train: Images, seed: int, dense: PrunableViT
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same with the dense model's logits, which all processes of this machine share."""
        inputs = [weights_digest(dense), train.digest, str(self.steps), str(seed)]
        path = TEACHER / f"{hashlib.sha256(' '.join(inputs).encode()).hexdigest()[:24]}.pt"
        TEACHER.mkdir(exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with torch.inference_mode():
                    found = [dense(images) for images, _ in self.epoch(train, seed)]
                replace_file(path, lambda temporary: torch.save(found, temporary))
        answers = torch.load(path)
        for (images, labels), logits in zip(self.epoch(train, seed), answers, strict=True):
            yield images, labels, logits


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Top-1 in percent."""

    untuned: float
    val: float
    test: float


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--train", default=str(SAMPLE / "train.parquet"))
    parser.add_argument("--test", help="Parquet files of CIFAR-10's test split")
    parser.add_argument("--images", type=int, default=4_000, help="per epoch, other ones each time")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--learn-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    return parser


def tuning_of(args: argparse.Namespace) -> Tuning:
    return Tuning(
        train=args.train,
        val="" if args.test else str(SAMPLE / "val.parquet"),
        test=args.test or str(SAMPLE / "test.parquet"),
        images=args.images,
        epochs=args.epochs,
    )


def dense_model() -> PrunableViT:
    dense = PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()
    dense.use_fused_attention(False)
    return dense


def plan_for(
    method: UnitPruner, scores: Scores, shape: ViTShape, budget: float, *, tokens: bool
) -> Plan:
    """Units down to a share of the MACs, or to its square root and the rest by ToMe."""
    macs, target = cost_of(shape).macs, budget**0.5 if tokens else budget
    shares = method.allocate(shape, scores, target * macs)
    steps = [Step(pruner=method, thresholds=shares)]
    if tokens:
        tome = load_method("tome")
        counts = tome.allocate(method.shrink(shape, shares), {}, budget * macs)
        steps.append(Step(pruner=tome, thresholds=counts))
    return Plan(steps=tuple(steps))


def in_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(250), labels.split(250), strict=True)


def tune(vit: PrunableViT, dense: PrunableViT, seed: int, tuning: Tuning, **recipe: float) -> Tuned:
    """Fine-tune a cut model, on the same images for all methods of a seed."""
    train, (val, test) = tuning.training_images(), tuning.evaluation_images()
    vit.use_fused_attention(False)
    untuned = evaluate(vit, in_batches(*val)).top1
    torch.manual_seed(seed)
    tuner = FineTuner(vit, Recipe(epochs=tuning.epochs, **recipe), tuning.steps, dense)
    for e in range(tuning.epochs):
        tuner.train_taught(tuning.taught_epoch(train, 7_000 + 100 * seed + e, dense))
    vit.eval()
    return Tuned(
        untuned=untuned,
        val=evaluate(vit, in_batches(*val)).top1,
        test=evaluate(vit, in_batches(*test)).top1,
    )


def cell(values: list[float]) -> str:
    """Mean and largest deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {max(abs(v - mean) for v in values):.1f}"


def _whole(source: str) -> list[Tensor]:
    pairs = list(open_images(source, SPEC).batches(500, seed=None, augment=False))
    return [torch.cat([pair[i] for pair in pairs]) for i in (0, 1)]
