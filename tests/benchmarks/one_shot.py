"""One-shot weight pruning of the sample's ViT without fine-tuning, by every weight method.

    python tests/benchmarks/one_shot.py

Validation top-1 in percent at 50 % and 70 % of the weights removed: mean and largest deviation over
three seeds, each a different set of calibration images, the same for all methods. Every method
spreads the sparsity over the layers by its own scores, one global threshold; FastCAP gives each
layer the same, as in its paper.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from pruners import Plan, PrunableViT, Step, ViTShape, cost_of, load_method
from pruners.training.evaluation import evaluate
from search.data.decode import ImageSpec
from search.data.images import Images, open_images

SAMPLE = Path(__file__).parents[2] / "search" / "sample"
METHODS: dict[str, dict[str, object]] = {
    "magnitude": {},
    "taylor": {},
    "obd": {},
    "fisher": {},
    "woodfisher": {},
    "mfac": {"block": 512},
    "cap": {},
    "fast_cap": {"scope": "layer"},
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def budget(shape: ViTShape, sparsity: float) -> float:
    """Effective MACs that are left when that share of the linear layers' weights is removed."""
    linear = sum(rows * columns * tokens for _, rows, columns, tokens in shape.linears())
    return cost_of(shape).effective_macs - sparsity * linear


def calibration(images: Images, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    return list(images.batches(64, seed=seed, augment=False))[: count // 64]


def top1(name: str, sparsity: float, batches: list[tuple[Tensor, Tensor]], val: Images) -> float:
    method = load_method(name, **METHODS[name])
    vit = PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()
    scores = method.score(vit, batches)
    shares = method.allocate(vit.shape(), scores, budget(vit.shape(), sparsity))
    Plan(steps=(Step(pruner=method, thresholds=shares),)).apply(vit, batches)
    vit.use_fused_attention(False)
    return evaluate(vit, val.batches(500, seed=None, augment=False)).top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    spec = ImageSpec(size=(32, 32), channels=3, mean=MEAN, std=STD)
    train, val = (open_images(str(SAMPLE / f"{split}.parquet"), spec) for split in ("train", "val"))
    sets = [calibration(train, args.images, seed) for seed in range(args.seeds)]
    torch.set_num_threads(2)
    print(f"{'method':12} {'50 %':>14} {'70 %':>14} {'seconds':>9}", flush=True)
    for name in args.methods:
        start, cells = time.perf_counter(), []
        for sparsity in (0.5, 0.7):
            found = [top1(name, sparsity, batches, val) for batches in sets]
            mean = statistics.fmean(found)
            cells.append(f"{mean:.1f} +- {max(abs(f - mean) for f in found):.1f}")
        seconds = (time.perf_counter() - start) / (2 * args.seeds)
        print(f"{name:12} {cells[0]:>14} {cells[1]:>14} {seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
