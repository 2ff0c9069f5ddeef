"""Why WDPruning falls short on the sample's ViT: is it which units go, or how many from where?

    python tests/benchmarks/wdpruning_ranking.py

WDPruning learns for half of the MACs on the sample, with and without its plug-in classifiers. Its
shares of heads and neurons are then cut from the dense weights by its own ranking and by Taylor's;
validation top-1 before any fine-tuning, and Spearman's correlation of the two rankings of the
neurons of each block.
"""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor
from tuning import BATCH, SAMPLE, SPEC, dense_model

from pruners import cost_of, load_method
from pruners.methods.wdpruning import WDPruning
from pruners.model.sites import kind_of
from pruners.training.evaluation import evaluate
from pruners.training.learner import LearningData
from search.data.images import open_images

CASES = {
    "with exits": WDPruning(),
    "without exits": WDPruning(units=("head", "neuron", "attn_out", "mlp_out")),
}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: Pearson's of the ranks."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def measure(name: str) -> str:
    torch.set_num_threads(1)
    train, val = (open_images(str(SAMPLE / f"{s}.parquet"), SPEC) for s in ("train", "val"))
    dense = dense_model()
    method, shape = CASES[name], dense.shape()
    data = LearningData(
        train=lambda epoch: train.batches(BATCH, seed=epoch, augment=True),
        val=lambda: val.batches(250, seed=None, augment=False),
        steps=len(train) // BATCH,
    )
    learned = method.learn(dense, data)
    shares = method.allocate(shape, learned.scores, 0.5 * cost_of(shape).effective_macs)
    grouped = load_method("grouped")
    taylor = grouped.score(
        dense, list(itertools.islice(train.batches(BATCH, seed=0, augment=False), 8))
    )
    wanted = {site: share for site, share in shares.items() if site in taylor}
    own = {site: learned.scores[site] for site in taylor}
    cells = []
    for scores in (own, taylor):
        vit = copy.deepcopy(dense)
        grouped.cut(vit, scores, wanted)
        cells.append(f"{evaluate(vit, data.val()).top1:.1f}")
    neurons = [site for site in taylor if kind_of(site) == "neuron"]
    cells.append(", ".join(f"{rank_correlation(own[s], taylor[s]):.2f}" for s in neurons))
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    print(
        "| WDPruning | own ranking | Taylor's ranking | correlation by block |\n|---|---|---|---|"
    )
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for line in pool.map(measure, CASES):
            print(line, flush=True)


if __name__ == "__main__":
    main()
