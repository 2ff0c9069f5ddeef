"""Cuts of a pretrained DINOv2 ViT-S/14 with a linear head for CIFAR-10, at 98 pixels.

    python tests/benchmarks/dinov2_cuts.py --model ENCODER --head HEAD --train T --test T

ENCODER and HEAD are safetensors: timm's vit_small_patch14_dinov2 without a classifier, and `head.*`
of a classifier for CIFAR-10. Top-1 in percent on --images test images, by budget, score, with the
solve and without, untuned and after one epoch of 600 images; with --tokens a part of the budget is
met by ToMe: units reach its square root, tokens the rest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from tuning import plan_for

from pruners import PrunableViT, cost_of, load_method
from pruners.families.learned import Learned
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe
from search.data.decode import ImageSpec
from search.data.images import open_images

SIZE, GRID = 98, (7, 7)
# CIFAR's own pictures; they are scaled here, for the encoder's statistics are of larger ones.
SPEC = ImageSpec(size=(32, 32), channels=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = {
    "magnitude": load_method("grouped", criterion="magnitude"),
    "taylor": load_method("grouped", criterion="taylor"),
    "surgeon": load_method("surgeon"),
}


def model(encoder: str, head: str) -> PrunableViT:
    state = {name: tensor.float() for name, tensor in load_file(encoder).items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(GRID), num_prefix_tokens=1)
    state |= load_file(head)
    vit = PrunableViT.from_state_dict(
        state, "vit_small_patch14_dinov2", img_size=SIZE, num_classes=10
    )
    vit.use_fused_attention(False)
    return vit.eval()


def images(source: str, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 32 images, scaled by bicubic interpolation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    batches = open_images(source, SPEC).batches(32, seed=seed, augment=False)
    scaled = (
        (F.interpolate(x, SIZE, mode="bicubic", antialias=True).clamp(0, 1), y) for x, y in batches
    )
    few = itertools.islice(scaled, -(-count // 32))
    return [((x - mean) / std, y) for x, y in few]


def rows(args: argparse.Namespace) -> Iterator[str]:
    dense = model(args.model, args.head)
    test, train = images(args.test, args.images, 1), images(args.train, 512 + 600, args.seed)
    calibration, training = train[:16], train[16:]
    macs = cost_of(dense.shape()).macs
    yield f"dense: {evaluate(dense, iter(test)).top1:.1f}, {macs / 1e9:.3f} GMACs"
    for name in args.methods:
        start = time.perf_counter()
        method = METHODS[name]
        learned = Learned(scores=method.score(dense, calibration))
        yield f"{name}: scored in {time.perf_counter() - start:.0f} s"
        for budget, solved in itertools.product(args.budgets, (False, True)):
            pruner = replace(method, compensate=solved)
            chosen = plan_for(pruner, learned.scores, dense.shape(), budget, tokens=args.tokens)
            vit, start = model(args.model, args.head), time.perf_counter()
            chosen.apply(vit, calibration, learned)
            seconds = time.perf_counter() - start
            share = cost_of(vit.shape()).macs / macs
            untuned, tuned = evaluate(vit, iter(test)).top1, float("nan")
            if args.epochs:
                vit.requires_grad_(True)
                recipe = Recipe(epochs=args.epochs, lr=args.lr)
                tuner = FineTuner(vit, recipe, len(training), dense)
                for _ in range(args.epochs):
                    tuner.train_epoch(training)
                tuned = evaluate(vit.eval(), iter(test)).top1
            how = "solved" if solved else "as cut"
            yield (
                f"| {name} | {how} | {share:.3f}x | {untuned:.1f} | {tuned:.1f} | {seconds:.0f} s |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "head", "train", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", type=int, default=1_000, help="test images")
    parser.add_argument("--epochs", type=int, default=1, help="of 600 images")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", action="store_true", help="ToMe beside the units")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.89, 0.72, 0.40])
    args = parser.parse_args()
    for row in rows(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
