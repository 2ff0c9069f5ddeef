"""How much of a budget the width should take: the sample's ViT, untuned and after a short tuning.

    python tests/benchmarks/width_split.py --epochs 2

The model as it is, and turned to the principal directions of its stream. Channels, heads and
neurons by Taylor's scores of the same 512 images. "same loss" is what `grouped` does: channels and
other units lose the same share of all their scores. With a number, of a budget of r times the
multiply-adds the width alone reaches r^number, heads and neurons the rest; "one ranking" lets all
compete by score per multiply-add. Columns: model, budget, way, cost, channels that are left,
validation top-1 in percent, and after a tuning of `--steps` batches of 128 per epoch, the same for
all.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch

from pruners import PrunableViT, cost_of, load_method
from pruners.families.allocation import rank_globally
from pruners.model.ranking import slice_scores
from pruners.model.rotation import rotated
from pruners.model.types import Scores, Thresholds
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe
from search.data.decode import ImageSpec
from search.data.images import open_images

SAMPLE = Path(__file__).parents[2] / "search" / "sample"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SPEC = ImageSpec(size=(32, 32), channels=3, mean=MEAN, std=STD)
BOTH = load_method("grouped", units=("head", "neuron", "width"))


def split(dense: PrunableViT, scores: Scores, ratio: float, part: float) -> Thresholds:
    """Shares where the width alone reaches ratio^part."""
    shape, found = dense.shape(), {"width": 0.0}
    macs = cost_of(shape).effective_macs
    if part > 0.0:
        width = load_method("grouped", units=("width",))
        found = dict(width.allocate(shape, scores, ratio**part * macs))
    if part < 1.0:
        rest, narrow = load_method("grouped"), BOTH.shrink(shape, found)
        found |= rest.allocate(narrow, scores, ratio * macs)
    return found


def one_ranking(dense: PrunableViT, scores: Scores, ratio: float) -> Thresholds:
    shape = dense.shape()
    steps = {site: slice_scores(own) for site, own in scores.items()}
    macs = ratio * cost_of(shape).effective_macs
    return rank_globally(shape, steps, lambda shares: BOTH.shrink(shape, shares), macs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--parts", type=float, nargs="+", default=[0, 0.125, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--models", nargs="+", default=["as it is", "rotated"])
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--steps", type=int, default=31, help="batches of an epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val = (open_images(str(SAMPLE / f"{s}.parquet"), SPEC) for s in ("train", "val"))
    dense = PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()
    calibration = list(itertools.islice(train.batches(64, seed=0, augment=False), 8))
    models = {"as it is": dense, "rotated": rotated(dense, calibration)}
    dense.use_fused_attention(False)
    epochs = []
    with torch.no_grad():
        for epoch in range(args.epochs):
            batches = itertools.islice(train.batches(128, seed=epoch, augment=True), args.steps)
            epochs.append([(images, labels, dense(images)) for images, labels in batches])

    def top1(vit: PrunableViT) -> str:
        vit.use_fused_attention(False)
        return f"{evaluate(vit.eval(), val.batches(250, seed=None, augment=False)).top1:.1f}"

    def measure(model: PrunableViT, scores: Scores, shares: Thresholds) -> list[str]:
        vit = copy.deepcopy(model)
        BOTH.cut(vit, scores, shares)
        ratio = cost_of(vit.shape()).macs / cost_of(model.shape()).macs
        cells = [f"{ratio:.3f}x", str(vit.shape().dim), top1(vit)]
        if epochs:
            torch.manual_seed(0)
            tuner = FineTuner(vit, Recipe(epochs=args.epochs), args.steps)
            for batches in epochs:
                tuner.train_taught(batches)
            cells.append(top1(vit))
        return cells

    for name in args.models:
        scores = BOTH.score(models[name], calibration)
        for ratio in args.budgets:
            ways = {f"{part:g}": split(dense, scores, ratio, part) for part in args.parts}
            macs = ratio * cost_of(dense.shape()).effective_macs
            ways["same loss"] = BOTH.allocate(dense.shape(), scores, macs)
            ways["one ranking"] = one_ranking(dense, scores, ratio)
            for way, shares in ways.items():
                cells = " | ".join(measure(models[name], scores, shares))
                print(f"| {name} | {ratio:g} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
