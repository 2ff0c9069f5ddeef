"""How much of a budget the width should take: the sample's ViT, untuned and after a short tuning.

    python tests/benchmarks/width_split.py --epochs 2

Channels, heads and neurons by Taylor's scores of the same 512 images. Of a budget of r times the
multiply-adds the width alone reaches r^part, heads and neurons the rest in one ranking; "one
ranking" lets channels, heads and neurons compete by score per multiply-add instead. Validation
top-1 in percent and the channels that are left. A tuning takes `--steps` batches of 128 per epoch
of the default recipe, the same for all.
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
from pruners.model.types import Scores, Thresholds
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe
from search.data.decode import ImageSpec
from search.data.images import open_images

SAMPLE = Path(__file__).parents[2] / "search" / "sample"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PARTS = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
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
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--steps", type=int, default=31, help="batches of an epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val = (open_images(str(SAMPLE / f"{s}.parquet"), SPEC) for s in ("train", "val"))
    dense = PrunableViT.from_safetensors(SAMPLE / "vit_cifar10.safetensors").eval()
    dense.use_fused_attention(False)
    scores = BOTH.score(dense, list(itertools.islice(train.batches(64, seed=0, augment=False), 8)))
    epochs = []
    with torch.no_grad():
        for epoch in range(args.epochs):
            batches = itertools.islice(train.batches(128, seed=epoch, augment=True), args.steps)
            epochs.append([(images, labels, dense(images)) for images, labels in batches])

    def top1(vit: PrunableViT) -> float:
        return evaluate(vit, val.batches(250, seed=None, augment=False)).top1

    for ratio in args.budgets:
        ways = {f"{part:g}": split(dense, scores, ratio, part) for part in PARTS}
        ways["one ranking"] = one_ranking(dense, scores, ratio)
        for name, shares in ways.items():
            vit = copy.deepcopy(dense)
            BOTH.cut(vit, scores, shares)
            cells = [f"{cost_of(vit.shape()).macs / cost_of(dense.shape()).macs:.3f}x"]
            cells += [f"{vit.shape().dim} channels", f"{top1(vit):.1f}"]
            if epochs:
                torch.manual_seed(0)
                tuner = FineTuner(vit, Recipe(epochs=args.epochs), args.steps)
                for batches in epochs:
                    tuner.train_taught(batches)
                cells.append(f"{top1(vit.eval()):.1f}")
            print(f"| {ratio:g} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
