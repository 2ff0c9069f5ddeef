"""What a unit cut is worth before any training, with what stays solved anew and without, and after.

    python tests/benchmarks/unit_cuts.py [--train T --test T --images 8000 --epochs 3] [--tuned ...]

The sample's ViT, heads and neurons, with 512 calibration images of the seed. Top-1 in percent on
the sample's 1,000 validation images, and on the images of --test if they are given; mean and
largest deviation over the seeds. Rows of --tuned are fine-tuned too, all by the same recipe. With
--tokens a part of the budget is met by ToMe: units reach its square root, tokens the rest.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch import Tensor
from tuning import SAMPLE, SPEC, Tuning, arguments, cell, dense_model, plan_for, tune, tuning_of

from pruners import cost_of, load_method
from pruners.families.learned import Learned
from pruners.families.unit import UnitPruner
from pruners.training.evaluation import evaluate
from search.data.images import open_images

METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "magnitude": ("grouped", {"criterion": "magnitude"}),
    "taylor": ("grouped", {"criterion": "taylor"}),
    "fisher": ("grouped", {"criterion": "fisher"}),
    "cap": ("grouped", {"criterion": "cap"}),
    "surgeon": ("surgeon", {}),
    "surgeon, drawn labels": ("surgeon", {"labels": "drawn"}),
    "taylor, width too": ("grouped", {"units": ("head", "neuron", "width")}),
    "surgeon, width too": ("surgeon", {"units": ("head", "neuron", "width")}),
    "surgeon, width alone": ("surgeon", {"units": ("width",)}),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cut.

    Attributes:
        macs: Share of the dense model's.
        sample: Untuned top-1 on the sample's validation images.
        untuned: The same on the images of --test.
        val: Tuned, on the validation images of fine-tuning.
        test: Tuned, on its test images.
        scoring: Seconds.
        solving: Seconds, of the cut as well (and of ToMe's).
    """

    macs: float
    sample: float
    untuned: float
    val: float = float("nan")
    test: float = float("nan")
    scoring: float = 0.0
    solving: float = 0.0


def calibration(tuning: Tuning, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    batches = open_images(tuning.train, SPEC).batches(64, seed=seed, augment=False)
    return [batch for _, batch in zip(range(count // 64), batches, strict=False)]


def top1(vit: torch.nn.Module, source: str) -> float:
    return evaluate(vit, open_images(source, SPEC).batches(250, seed=None, augment=False)).top1


def measure(
    name: str, seed: int, tuning: Tuning, args: argparse.Namespace
) -> list[tuple[str, float, bool, Row]]:
    """Cut at each budget, with the solve and without."""
    torch.set_num_threads(1)
    kind, options = METHODS[name]
    batches = calibration(tuning, args.calibration, seed)
    dense = dense_model()
    if args.rotated:
        dense = dense.rotated(batches)
        dense.use_fused_attention(False)
    method = load_method(kind, **options)
    assert isinstance(method, UnitPruner)
    start = time.perf_counter()
    scores = method.score(dense, batches)
    scoring, macs, found = time.perf_counter() - start, cost_of(dense_model().shape()).macs, []
    for budget in args.budgets:
        plan = plan_for(method, scores, dense.shape(), budget, tokens=args.tokens)
        for solved in (False, True):
            first = replace(plan.steps[0], pruner=replace(method, compensate=solved))
            vit = copy.deepcopy(dense)
            start = time.perf_counter()
            replace(plan, steps=(first, *plan.steps[1:])).apply(
                vit, batches, Learned(scores=scores)
            )
            solving = time.perf_counter() - start
            row = Row(
                macs=cost_of(vit.shape()).macs / macs,
                sample=top1(vit, str(SAMPLE / "val.parquet")),
                untuned=top1(vit, tuning.test),
                scoring=scoring,
                solving=solving,
            )
            if name in args.tuned:
                after = tune(vit, dense, seed, tuning)
                row = replace(row, val=after.val, test=after.test)
            found.append((name, budget, solved, row))
    return found


def table(rows: list[tuple[str, float, bool, Row]]) -> Iterator[str]:
    yield "| score | MACs | solved | sample | test | tuned: val | tuned: test | score, solve, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, budget, solved in dict.fromkeys(row[:3] for row in rows):
        own = [row for *key, row in rows if key == [name, budget, solved]]
        cells = [cell([getattr(r, k) for r in own]) for k in ("sample", "untuned", "val", "test")]
        seconds = [statistics.fmean(getattr(r, k) for r in own) for k in ("scoring", "solving")]
        share = statistics.fmean(r.macs for r in own)
        cells = [name, f"{share:.3f}x", "yes" if solved else "no", *cells]
        yield f"| {' | '.join(cells)} | {seconds[0]:.1f}, {seconds[1]:.1f} |"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tuned", nargs="*", default=[], help="methods that are fine-tuned too")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.49, 0.29])
    parser.add_argument("--tokens", action="store_true", help="ToMe beside the units")
    parser.add_argument("--rotated", action="store_true", help="to its principal directions")
    parser.add_argument("--calibration", type=int, default=512, help="images")
    args = parser.parse_args()
    tuning, rows, start = tuning_of(args), [], time.perf_counter()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(measure, name, seed, tuning, args)
            for name in args.methods
            for seed in args.seeds
        ]
        for future in as_completed(pending):
            rows += future.result()
            for row in future.result():
                print(f"{time.perf_counter() - start:6.0f} s  {row}", flush=True)
    order = {name: i for i, name in enumerate(METHODS)}
    rows.sort(key=lambda row: (order[row[0]], -row[1], row[2]))
    print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    main()
