"""Token reduction of the sample's ViT at 0.7 and 0.5 of its MACs, fine-tuned the same way.

    python tests/benchmarks/token_methods.py

Validation and test top-1 in percent, mean and largest deviation over the seeds, and images/s of the
cut model in batches of 64 against the dense model, timed in turn on two threads after all training.
Every method decides its own places and counts for the budget. "random" drops random patches, other
ones in every pass, where EViT would; "cait" has its channels too, which learn before for a share of
the budget. Without --train and --test the repository's own sample is used; the images of --test are
halved into validation and test.
"""

from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from speed import in_turn
from tuning import Tuned, Tuning, arguments, cell, dense_model, in_batches, tune, tuning_of

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.families.learned import Learned, LearnedPruner
from pruners.model.attention import Attended
from pruners.model.tokens import MiddleReducer, Tokens, take_tokens
from pruners.training.learner import LearningData

METHODS = (
    "random",
    "evit",
    "tome",
    "pitome",
    "mctf",
    "dynamic_vit",
    "spvit",
    "cait_tokens",
    "cait",
)


class DropRandom(MiddleReducer):
    """Keeps as many patches as another reducer, any ones."""

    def __init__(self, prefix_tokens: int, patches: int) -> None:
        super().__init__()
        self.prefix_tokens, self.patches = prefix_tokens, patches

    def tokens_after(self, tokens: int) -> int:
        return self.prefix_tokens + self.patches

    def macs(self, tokens: int) -> int:
        return 0

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        prefix, body = tokens.x[:, : self.prefix_tokens], tokens.x[:, self.prefix_tokens :]
        chosen = torch.rand(body.shape[:2], device=body.device).topk(self.patches, dim=1).indices
        return tokens._replace(x=torch.cat([prefix, take_tokens(body, chosen)], dim=1))


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    budget: float
    seed: int
    tuned: Tuned
    macs: float
    learning_s: float


def cut(
    name: str, budget: float, dense: PrunableViT, learned: Learned | None = None
) -> PrunableViT:
    """The dense model cut to a budget, not trained since."""
    vit, macs = copy.deepcopy(dense), budget * cost_of(dense.shape()).macs
    if name == "random":
        evit = load_method("evit", fuse=False)
        evit.cut(vit, {}, evit.allocate(vit.shape(), {}, macs))
        for block, shape in zip(vit.blocks, vit.shape().blocks, strict=True):
            if block.middle is not None:
                prefix = vit.shape().prefix_tokens
                block.middle = DropRandom(prefix, shape.mlp_tokens - prefix)
        return vit
    steps = []
    if learned is not None:
        channels = load_method("cait_channels")
        own = channels.allocate(vit.shape(), learned.scores, math.sqrt(budget) * macs / budget)
        steps.append(Step(pruner=channels, thresholds=own))
        name = "cait_tokens"
    shape, method = Plan(steps=tuple(steps)).shape(vit.shape()), load_method(name)
    steps.append(Step(pruner=method, thresholds=method.allocate(shape, {}, macs)))
    Plan(steps=tuple(steps)).apply(vit, (), learned)
    return vit


def learn_channels(
    budget: float, seed: int, tuning: Tuning, epochs: int, dense: PrunableViT
) -> Learned:
    """Channels take the square root of the budget, tokens the rest."""
    channels = load_method("cait_channels", seed=seed, epochs=epochs, budget=math.sqrt(budget))
    assert isinstance(channels, LearnedPruner)
    train, (val, _) = tuning.training_images(), tuning.evaluation_images()
    data = LearningData(
        train=lambda e: tuning.epoch(train, 1_000 * seed + e),
        val=lambda: in_batches(*val),
        steps=tuning.steps,
    )
    return channels.learn(dense, data)


def measure(
    name: str, budget: float, seed: int, tuning: Tuning, learn_epochs: int
) -> tuple[Row, Learned | None]:
    torch.set_num_threads(1)
    dense, learned = dense_model(), None
    if name == "cait":
        learned = learn_channels(budget, seed, tuning, learn_epochs, dense)
    torch.manual_seed(seed)
    vit = cut(name, budget, dense, learned)
    row = Row(
        name=name,
        budget=budget,
        seed=seed,
        tuned=tune(vit, dense, seed, tuning),
        macs=cost_of(vit.shape()).macs / cost_of(dense.shape()).macs,
        learning_s=learned.report["seconds"] if learned is not None else 0.0,
    )
    return row, learned


def table(rows: list[Row], learned: dict[tuple[str, float], Learned | None], rounds: int) -> None:
    torch.set_num_threads(2)
    dense = dense_model()
    dense.use_fused_attention(True)
    images = torch.randn(64, 3, 32, 32)
    print("\n| MACs | method | validation | test | before fine-tuning | images/s | of the dense |")
    print("|---|---|---|---|---|---|---|")
    for budget in sorted({row.budget for row in rows}, reverse=True):
        for name in METHODS:
            of = [row for row in rows if (row.name, row.budget) == (name, budget)]
            if not of:
                continue
            vit = cut(name, budget, dense, learned[name, budget])
            rate, ratio = in_turn(vit.eval(), dense, images, rounds, warmup=3)
            print(
                f"| {of[0].macs:.3f}x | {name} | {cell([r.tuned.val for r in of])} | "
                f"{cell([r.tuned.test for r in of])} | {cell([r.tuned.untuned for r in of])} | "
                f"{rate:,.0f} | {ratio:.2f}x |"
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    tuning, start = tuning_of(args), time.perf_counter()
    rows: list[Row] = []
    learned: dict[tuple[str, float], Learned | None] = {}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(measure, name, budget, seed, tuning, args.learn_epochs)
            for name in args.methods
            for budget in args.budgets
            for seed in args.seeds
        ]
        for future in as_completed(pending):
            row, found = future.result()
            rows.append(row)
            learned[row.name, row.budget] = found
            print(f"{time.perf_counter() - start:6.0f} s  {row}", flush=True)
    table(rows, learned, args.rounds)


if __name__ == "__main__":
    main()
