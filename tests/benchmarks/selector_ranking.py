"""Why learned selectors are no better than chance after a short fine-tuning: DynamicViT at 0.5.

    python tests/benchmarks/selector_ranking.py

The sample's ViT is cut to half its MACs by DynamicViT and fine-tuned as in token_methods.py, with
and without the phase in which selectors settle. Then the same weights are evaluated with the
patches of highest score, with as many patches at random, and with those of highest score after the
noise of training was added to the scores. The spread is that of the keep log-odds within an image;
the noise of training has a standard deviation of 1.8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import torch
from torch import Tensor
from tuning import Tuning, arguments, cell, dense_model, in_batches, tune, tuning_of

from pruners import cost_of, load_method
from pruners.methods import dynamic_vit
from pruners.model.tokens import split_by_score
from pruners.training.evaluation import evaluate

SETTLE = (0.0, 0.33)


def log_odds(log_keep: Tensor) -> Tensor:
    return log_keep - torch.log1p(-log_keep.exp())


def with_noise(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
    return split_by_score(log_odds(scores) + uniform.logit(), kept)


def at_random(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    return split_by_score(torch.rand_like(scores), kept)


RANKINGS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "highest scores": split_by_score,
    "random": at_random,
    "scores and noise": with_noise,
}


def measure(settle: float, seed: int, tuning: Tuning) -> tuple[float, dict[str, float], float]:
    torch.set_num_threads(1)
    dense = dense_model()
    vit, method = copy.deepcopy(dense), load_method("dynamic_vit")
    torch.manual_seed(seed)
    method.cut(vit, {}, method.allocate(vit.shape(), {}, 0.5 * cost_of(vit.shape()).macs))
    tune(vit, dense, seed, tuning, selector_settle=settle)
    spreads: list[Tensor] = []

    def watched(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        spreads.append(log_odds(scores).std(dim=1).mean())
        return split_by_score(scores, kept)

    _, test = tuning.evaluation_images()
    found = {}
    for name, ranking in RANKINGS.items():
        with patch.object(dynamic_vit, "split_by_score", ranking):
            found[name] = evaluate(vit, in_batches(*test)).top1
    with patch.object(dynamic_vit, "split_by_score", watched):
        evaluate(vit, in_batches(*test))
    return settle, found, torch.stack(spreads).mean().item()


def main() -> None:
    args = arguments(__doc__).parse_args()
    tuning = tuning_of(args)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(measure, s, seed, tuning) for s in SETTLE for seed in args.seeds]
        results = [run.result() for run in runs]
    print(f"| settling, share of the steps | {' | '.join(RANKINGS)} | spread |")
    print("|---" * (len(RANKINGS) + 2) + "|")
    for settle in SETTLE:
        of = [(found, spread) for at, found, spread in results if at == settle]
        cells = [cell([found[name] for found, _ in of]) for name in RANKINGS]
        spread = sum(s for _, s in of) / len(of)
        print(f"| {settle} | {' | '.join(cells)} | {spread:.2f} |")


if __name__ == "__main__":
    main()
