"""Unit pruning of the sample's ViT at half its MACs, fine-tuned the same way, by every method.

    python tests/benchmarks/learned_units.py

Validation and test top-1 in percent, mean and largest deviation over the seeds; seconds of learning
beside it, and the share of the dense MACs that is left, as dense kernels run them. Every method
decides its own layer-wise shares for the budget; "uniform" and "random" give every site the same.
Without --train and --test the repository's own sample is used; the images of --test are halved into
validation and test.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from pruners import PrunableViT, ViTShape, cost_of, load_method
from pruners.allocation import same_share
from pruners.gates import LearningData
from pruners.learned import LearnedPruner
from pruners.pruner import Scores, Thresholds
from pruners.training import FineTuner, Recipe, evaluate
from pruners.unit_pruner import UnitPruner
from search.decode import ImageSpec
from search.parquet import Images, open_images

SAMPLE = Path(__file__).parents[2] / "search" / "sample"
SPEC = ImageSpec(
    size=(32, 32), channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
BATCH = 64
BASELINES = ("uniform", "random", "grouped magnitude", "grouped taylor")
LEARNED: dict[str, tuple[str, dict[str, object]]] = {
    "x_pruner": ("x_pruner", {}),
    "x_pruner, global": ("x_pruner", {"thresholds": "global"}),
    "wdpruning": ("wdpruning", {}),
    "uvc": ("uvc", {}),
    "vit_slim": ("vit_slim", {}),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    train: str
    val: str
    test: str
    budget: float
    images: int
    epochs: int
    learn_epochs: int
    both: bool
    options: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Cut:
    name: str
    vit: PrunableViT
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    seed: int
    val: float
    test: float
    macs: float
    learning_s: float
    untuned: float


def splits(settings: Settings) -> tuple[Images, list[Tensor], list[Tensor]]:
    """Training images, and images and labels of validation and test."""
    train = open_images(settings.train, SPEC)
    if settings.val:
        return train, _whole(settings.val), _whole(settings.test)
    both = _whole(settings.test)
    return train, [t[0::2] for t in both], [t[1::2] for t in both]


def _whole(source: str) -> list[Tensor]:
    pairs = list(open_images(source, SPEC).batches(500, seed=None, augment=False))
    return [torch.cat([pair[i] for pair in pairs]) for i in (0, 1)]


def in_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(250), labels.split(250), strict=True)


def within(
    budget: float, shape: ViTShape, allocate: Callable[[float], Thresholds], method: UnitPruner
) -> Thresholds:
    """Thresholds whose dense kernels run within the budget: padding counts."""
    dense = cost_of(shape).macs
    wanted = budget * dense
    while True:
        shares = allocate(wanted)
        over = cost_of(method.shrink(shape, shares)).macs - budget * dense
        if over <= 0:
            return shares
        wanted -= max(over, 0.002 * dense)


def epoch(train: Images, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = train.batches(BATCH, seed=seed, augment=True)
    return itertools.islice(batches, settings.images // BATCH)


def learned_cuts(name: str, seed: int, settings: Settings, dense: PrunableViT) -> Iterator[Cut]:
    """Learn once; cut the weights that were trained along, then the dense model's own."""
    train, val, _ = splits(settings)
    method_name, options = LEARNED[name]
    method = load_method(method_name, **({"seed": seed} | options))
    assert isinstance(method, LearnedPruner)
    method = dataclasses.replace(method.for_budget(settings.budget), epochs=settings.learn_epochs)
    method = dataclasses.replace(method, **settings.options)
    data = LearningData(
        train=lambda e: epoch(train, settings, 1_000 * seed + e),
        val=lambda: in_batches(*val),
        steps=settings.images // BATCH,
    )
    learned, shape = method.learn(dense, data), dense.shape()
    print(f"  {name}, seed {seed}: {dict(learned.report)}", flush=True)
    shares = within(
        settings.budget, shape, lambda m: method.allocate(shape, learned.scores, m), method
    )
    seconds = learned.report["seconds"]
    kept = copy.deepcopy(dense)
    method.cut_learned(kept, learned, shares)
    yield Cut(name=name, vit=kept, seconds=seconds)
    if learned.weights and settings.both:
        own = copy.deepcopy(dense)
        method.cut_learned(own, dataclasses.replace(learned, weights={}), shares)
        yield Cut(name=f"{name}, dense weights", vit=own, seconds=seconds)


def baseline_cut(name: str, seed: int, settings: Settings, dense: PrunableViT) -> Cut:
    """Cut by magnitude or Taylor scores, or at random."""
    train, shape = splits(settings)[0], dense.shape()
    calibration = list(itertools.islice(train.batches(BATCH, seed=seed, augment=False), 8))
    criterion = name.removeprefix("grouped ") if name.startswith("grouped") else "magnitude"
    grouped = load_method("grouped", criterion=criterion)
    assert isinstance(grouped, UnitPruner)
    scores: Scores = grouped.score(dense, calibration)
    macs = settings.budget * cost_of(shape).macs
    if name.startswith("grouped"):
        shares = grouped.allocate(shape, scores, macs)
    else:
        sites = list(grouped.sites(shape))
        shares = same_share(sites, lambda s: grouped.shrink(shape, s), macs, largest=0.99)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {s: torch.rand(v.shape, generator=generator) for s, v in scores.items()}
    vit = copy.deepcopy(dense)
    grouped.cut(vit, scores, shares)
    return Cut(name=name, vit=vit, seconds=0.0)


def measure(name: str, seed: int, settings: Settings) -> list[Row]:
    torch.set_num_threads(1)
    dense = PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()
    dense.use_fused_attention(False)
    if name in LEARNED:
        return [tuned(c, seed, settings, dense) for c in learned_cuts(name, seed, settings, dense)]
    return [tuned(baseline_cut(name, seed, settings, dense), seed, settings, dense)]


def tuned(cut: Cut, seed: int, settings: Settings, dense: PrunableViT) -> Row:
    """Fine-tune, the same way and on the same images for all methods of a seed."""
    train, val, test = splits(settings)
    vit = cut.vit
    vit.use_fused_attention(False)
    untuned = evaluate(vit, in_batches(*val)).top1
    torch.manual_seed(seed)
    tuner = FineTuner(vit, Recipe(epochs=settings.epochs), settings.images // BATCH, dense)
    for e in range(settings.epochs):
        tuner.train_epoch(epoch(train, settings, 7_000 + 100 * seed + e))
    vit.eval()
    return Row(
        name=cut.name,
        seed=seed,
        val=evaluate(vit, in_batches(*val)).top1,
        test=evaluate(vit, in_batches(*test)).top1,
        macs=cost_of(vit.shape()).macs / cost_of(dense.shape()).macs,
        learning_s=cut.seconds,
        untuned=untuned,
    )


def cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {max(abs(v - mean) for v in values):.1f}"


def order(name: str) -> tuple[int, str]:
    first = name.removesuffix(", dense weights")
    return [*BASELINES, *LEARNED].index(first), name


def table(rows: list[Row]) -> None:
    print("\n| method | validation | test | before fine-tuning | MACs | learning, s |")
    print("|---|---|---|---|---|---|")
    for name in sorted({row.name for row in rows}, key=order):
        of = [row for row in rows if row.name == name]
        macs = statistics.fmean(row.macs for row in of)
        seconds = statistics.fmean(row.learning_s for row in of)
        print(
            f"| {name} | {cell([r.val for r in of])} | {cell([r.test for r in of])} | "
            f"{cell([r.untuned for r in of])} | {macs:.3f}x | {seconds:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", default=str(SAMPLE / "train.parquet"))
    parser.add_argument("--test", help="Parquet files of CIFAR-10's test split")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=4_000, help="per epoch, other ones each time")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--learn-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, *LEARNED])
    parser.add_argument("--kept-only", action="store_true", help="no rows of dense weights")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--set", nargs="*", default=[], help="options of the methods, KEY=NUMBER")
    args = parser.parse_args()
    settings = Settings(
        train=args.train,
        val="" if args.test else str(SAMPLE / "val.parquet"),
        test=args.test or str(SAMPLE / "test.parquet"),
        budget=args.budget,
        images=args.images,
        epochs=args.epochs,
        learn_epochs=args.learn_epochs,
        both=not args.kept_only,
        options={k: float(v) for k, v in (pair.split("=") for pair in args.set)},
    )
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(measure, name, seed, settings)
            for name in args.methods
            for seed in args.seeds
        ]
        for future in as_completed(pending):
            rows += future.result()
            print(f"{time.perf_counter() - start:6.0f} s  {future.result()}", flush=True)
    table(rows)


if __name__ == "__main__":
    main()
