"""Do X-Pruner's class-wise masks show classes, and do a subset's masks serve the subset?

    python tests/benchmarks/class_masks.py --images 2000

X-Pruner learns masks (stage 1 alone) of the sample's ViT, once for each seed. First table: standard
deviation over the classes of a unit's masks, mean over the units, beside that over the seeds, which
is the masks' noise, and the correlation of two seeds' deviations from the units' means. Second
table: units cut from the dense weights by the masks of some classes, by those of all, and by
Taylor; top-1 among all ten classes on the validation images of these classes, mean and largest
deviation over the seeds. Without --train and --test the repository's own sample is used.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor
from tuning import BATCH, Tuning, arguments, cell, dense_model, in_batches, tuning_of

from pruners import PrunableViT, cost_of, load_method
from pruners.families.unit import UnitPruner
from pruners.methods.x_pruner import XPruner
from pruners.model.sites import kind_of
from pruners.model.types import Scores
from pruners.training.evaluation import evaluate
from pruners.training.learner import LearningData

SUBSETS = ((0, 3), (1, 8))
BUDGETS = (0.5, 0.3)


def masks(seed: int, tuning: Tuning, dense: PrunableViT) -> Scores:
    """Site -> [classes, units]."""
    train, (val, _) = tuning.training_images(), tuning.evaluation_images()
    data = LearningData(
        train=lambda e: tuning.epoch(train, 1_000 * seed + e),
        val=lambda: in_batches(*val),
        steps=tuning.steps,
    )
    return dict(XPruner(thresholds="global", seed=seed).learn(dense, data).by_class)


def spread(found: list[Scores]) -> None:
    print("| units | over classes | over seeds | correlation of two seeds |\n|---|---|---|---|")
    for kind in ("head", "neuron"):
        by_seed = torch.stack(
            [torch.cat([m for s, m in each.items() if kind_of(s) == kind], dim=1) for each in found]
        )  # [seeds, C, units]
        deviations = by_seed - by_seed.mean(dim=1, keepdim=True)
        classes, seeds = by_seed.std(dim=1).mean(), deviations.std(dim=0).mean()
        pair = torch.corrcoef(deviations[:2].flatten(1))[0, 1]
        print(f"| {kind}s | {classes:.3f} | {seeds:.3f} | {pair:.2f} |", flush=True)


def top1(vit: PrunableViT, val: list[Tensor], classes: tuple[int, ...]) -> float:
    chosen = torch.isin(val[1], torch.tensor(classes))
    return evaluate(vit, in_batches(*(t[chosen] for t in val))).top1


def cut(dense: PrunableViT, method: UnitPruner, scores: Scores, budget: float) -> PrunableViT:
    shape, vit = dense.shape(), copy.deepcopy(dense)
    macs = budget * cost_of(shape).effective_macs
    method.cut(vit, scores, method.allocate(shape, scores, macs))
    return vit


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    tuning, dense = tuning_of(args), dense_model()
    torch.set_num_threads(1)
    found = [masks(seed, tuning, dense) for seed in args.seeds]
    spread(found)
    train, (val, _) = tuning.training_images(), tuning.evaluation_images()
    grouped, x_pruner = load_method("grouped"), XPruner(thresholds="global")
    assert isinstance(grouped, UnitPruner)
    calibration = list(itertools.islice(train.batches(BATCH, seed=0, augment=False), 8))
    taylor = grouped.score(dense, calibration)
    print(
        "\n| classes | MACs | their masks | all masks | Taylor | dense |\n|---|---|---|---|---|---|"
    )
    for classes, budget in itertools.product(SUBSETS, BUDGETS):
        cells = []
        for wanted in (list(classes), slice(None)):
            ranked = [{s: m[wanted].mean(0) for s, m in each.items()} for each in found]
            vits = [cut(dense, x_pruner, scores, budget) for scores in ranked]
            cells.append(cell([top1(vit, val, classes) for vit in vits]))
        vits = [cut(dense, grouped, taylor, budget), dense]
        cells += [f"{top1(vit, val, classes):.1f}" for vit in vits]
        print(f"| {classes} | {budget}x | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
