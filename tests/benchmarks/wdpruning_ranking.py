"""Why WDPruning falls short on the sample's ViT: is it which units go, or how many from where?

    python tests/benchmarks/wdpruning_ranking.py

WDPruning learns for half of the MACs on the sample, with and without its plug-in classifiers. Its
shares of heads and neurons are then cut from the dense weights by its own ranking and by Taylor's;
validation top-1 before any fine-tuning, and Spearman's correlation of the two rankings of the
neurons of each block.

Is its idea at fault, or the length of the run? Its scores sum up the negative slopes of the loss
along masks. Second table: their mean over 2,048 images on the dense model, and on one in which half
of the neurons are masked at random; how well two halves of the images agree on the order of a
block's neurons, and how well this order is that of Taylor's scores.
"""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor
from tuning import BATCH, SAMPLE, SPEC, dense_model

from pruners import PrunableViT, cost_of, load_method
from pruners.methods.wdpruning import WDPruning
from pruners.model.gates import add_gates
from pruners.model.sites import kind_of
from pruners.model.types import Scores
from pruners.training.evaluation import evaluate
from pruners.training.learner import LearningData
from search.data.images import Images, open_images

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


def slopes(dense: PrunableViT, masked: float, train: Images) -> tuple[list[Tensor], list[Tensor]]:
    """Masks [F] of each block's neurons, a share of them 0, and negative slopes [batches, F]."""
    generator = torch.Generator().manual_seed(0)
    vit = copy.deepcopy(dense).requires_grad_(False)
    gates = add_gates(vit, "neuron")
    masks = [
        (torch.rand(block.hidden, generator=generator) >= masked).float()
        for block in dense.shape().blocks
    ]
    found = []
    for images, labels in itertools.islice(train.batches(BATCH, seed=5, augment=False), 32):
        leaves = [mask.clone().requires_grad_() for mask in masks]
        for gate, leaf in zip(gates, leaves, strict=True):
            gate["neuron"].value = leaf.view(-1)  # a view: the leaf shall be no parameter
        found.append(torch.autograd.grad(F.cross_entropy(vit(images), labels), leaves))
    return masks, [-torch.stack(of) for of in zip(*found, strict=True)]


def row(name: str, masked: float, kept: float) -> str:
    """Of the neurons whose mask is `kept`."""
    dense, train = dense_model(), open_images(str(SAMPLE / "train.parquet"), SPEC)
    calibration = list(itertools.islice(train.batches(BATCH, seed=0, augment=False), 8))
    grouped = load_method("grouped")
    taylor: Scores = grouped.score(dense, calibration)
    agree, relevant = [], []
    for index, (mask, found) in enumerate(zip(*slopes(dense, masked, train), strict=True)):
        chosen, half = mask == kept, len(found) // 2
        own = found[:, chosen]
        agree.append(f"{rank_correlation(own[:half].mean(0), own[half:].mean(0)):.2f}")
        reference = taylor[f"blocks.{index}.mlp.neuron"][chosen]
        relevant.append(f"{rank_correlation(own.mean(0), reference):.2f}")
    return f"| {name} | {', '.join(agree)} | {', '.join(relevant)} |"


def main() -> None:
    print(
        "| WDPruning | own ranking | Taylor's ranking | correlation by block |\n|---|---|---|---|"
    )
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for line in pool.map(measure, CASES):
            print(line, flush=True)
    torch.set_num_threads(1)
    print("\n| slopes of neurons | two halves agree | with Taylor |\n|---|---|---|")
    print(row("all kept", 0.0, 1.0), flush=True)
    print(row("half masked: the kept ones", 0.5, 1.0), flush=True)
    print(row("half masked: the masked ones", 0.5, 0.0), flush=True)


if __name__ == "__main__":
    main()
