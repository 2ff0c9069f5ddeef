"""What a unit cut costs: time and memory of its scores and of the solve, beside fine-tuning.

    python tests/benchmarks/unit_cut_cost.py [--model deit_small_patch16_224 --pixels 112]

The sample's ViT, or a timm model with random weights (cost does not depend on them) on random
images; 512 calibration images, half of the MACs. Seconds, and shares of a fine-tuning epoch of
--images images, whose rate is measured in the same process; memory is the largest that the process
takes beyond what it held before. Each method has a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor
from tuning import dense_model, plan_for
from unit_cuts import METHODS

from pruners import PrunableViT, load_method
from pruners.families.learned import Learned
from pruners.families.unit import UnitPruner
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe

CALIBRATION, BATCH, STEPS = 512, 64, 6


def model_of(args: argparse.Namespace) -> PrunableViT:
    if args.model is None:
        return dense_model()
    vit = PrunableViT.from_timm(args.model, pretrained=False, img_size=args.pixels)
    vit.use_fused_attention(False)
    return vit.eval()


def gigabytes() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def epoch_s(dense: PrunableViT, batches: list[tuple[Tensor, Tensor]], images: int) -> float:
    """Seconds of a fine-tuning epoch of so many images, by the rate of some steps."""
    vit = copy.deepcopy(dense).requires_grad_(True)
    tuner = FineTuner(vit, Recipe(epochs=1), images // BATCH, dense)
    few = list(itertools.islice(batches, STEPS + 1))
    tuner.train_epoch(few[:1])
    start = time.perf_counter()
    tuner.train_epoch(few[1:])
    return (time.perf_counter() - start) / STEPS / BATCH * images


def measure(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    dense = model_of(args)
    shape = dense.shape()
    images = torch.randn(CALIBRATION, shape.channels, *shape.image)
    labels = torch.randint(shape.classes, (CALIBRATION,))
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    kind, options = METHODS[name]
    method = load_method(kind, **options)
    assert isinstance(method, UnitPruner)

    before, start = gigabytes(), time.perf_counter()
    scores = method.score(dense, batches)
    scoring, scoring_gb = time.perf_counter() - start, gigabytes() - before
    plan = plan_for(method, scores, shape, 0.5, tokens=False)
    seconds = {}
    for solved in (False, True):
        vit, start = copy.deepcopy(dense), time.perf_counter()
        steps = (replace(plan.steps[0], pruner=replace(method, compensate=solved)),)
        replace(plan, steps=steps).apply(vit, batches, Learned(scores=scores))
        seconds[solved] = time.perf_counter() - start
    whole_gb = gigabytes() - before
    solving, epoch = seconds[True] - seconds[False], epoch_s(dense, batches, args.images)
    return (
        f"| {name} | {scoring:.1f} | {scoring / epoch:.3f} | {scoring_gb:.2f} "
        f"| {solving:.1f} | {solving / epoch:.3f} | {whole_gb:.2f} | {epoch:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="timm name; by default the sample's ViT")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--images", type=int, default=4_000, help="of an epoch")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    print("| method | score, s | of an epoch | GB | solve, s | of an epoch | GB, both | epoch, s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.methods:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(pool.submit(measure, name, args).result(), flush=True)


if __name__ == "__main__":
    main()
