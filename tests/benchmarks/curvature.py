"""Second-order pruning of one 384 x 1536 layer: batched over blocks, and as a plain loop over them.

    python tests/benchmarks/curvature.py             # times, as ratios within one run
    python tests/benchmarks/curvature.py --memory    # peak memory of CAP on a DeiT-S

The loop does the same arithmetic block by block; it is timed on a few blocks and scaled to all.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from pruners import Plan, PrunableViT, Step, load_method
from pruners.methods.cap import eliminate
from pruners.saliency.curvature import update_inverse
from pruners.saliency.gradients import evaluating, sample_gradients

WEIGHTS, BLOCK, GRADIENTS, LOOPED = 384 * 1536, 64, 256, 16


def seconds(measure: Callable[[], object]) -> float:
    start = time.perf_counter()
    measure()
    return time.perf_counter() - start


def one_by_one(gradients: Tensor, blocks: int) -> list[Tensor]:
    """The recursion of WoodFisher, block by block and gradient by gradient."""
    found = []
    for block in range(blocks):
        inverse = torch.eye(BLOCK) * 100.0
        for g in gradients[:, block * BLOCK : (block + 1) * BLOCK]:
            v = inverse @ g
            inverse = inverse - torch.outer(v, v) / (len(gradients) + g @ v)
        found.append(inverse)
    return found


def inverse_by_chunks(gradients: Tensor) -> Tensor:
    inverse = torch.eye(BLOCK).repeat(gradients.shape[1] // BLOCK, 1, 1) * 100.0
    for chunk in gradients.split(64):
        inverse = update_inverse(inverse, chunk, len(gradients))
    return inverse


def inverse_by_library(gradients: Tensor) -> Tensor:
    g = gradients.view(len(gradients), -1, BLOCK).transpose(0, 1)
    fisher = g.transpose(1, 2) @ g / len(gradients) + 0.01 * torch.eye(BLOCK)
    return torch.linalg.inv(fisher)


def times() -> None:
    torch.manual_seed(0)
    blocks = WEIGHTS // BLOCK
    gradients, weights = torch.randn(GRADIENTS, WEIGHTS), torch.randn(blocks, BLOCK)
    inverse = inverse_by_library(gradients)
    scale = blocks / LOOPED
    singles = [slice(i, i + 1) for i in range(LOOPED)]
    print(f"one layer of {WEIGHTS:,} weights, blocks of {BLOCK}, {GRADIENTS} gradients")
    show(
        ("inverse: loop over blocks", scale * seconds(lambda: one_by_one(gradients, LOOPED))),
        ("inverse: Woodbury, all blocks at once", seconds(lambda: inverse_by_chunks(gradients))),
        ("inverse: torch.linalg.inv of the blocks", seconds(lambda: inverse_by_library(gradients))),
    )
    show(
        (
            "CAP's elimination: loop over blocks",
            scale * seconds(lambda: [eliminate(weights[s], inverse[s]) for s in singles]),
        ),
        ("CAP's elimination: all blocks at once", seconds(lambda: eliminate(weights, inverse))),
    )
    per_image()


def show(*rows: tuple[str, float]) -> None:
    """Print times, and how many times faster than the first row."""
    for name, took in rows:
        print(f"  {name:42} {took:8.2f} s   {rows[0][1] / took:7.1f}x", flush=True)


def per_image() -> None:
    """Gradients of each image: outer products of one backward pass, against torch.func."""
    vit = PrunableViT.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(1000, (32,))
    sites = [site for site, _ in vit.linears()]
    names = [f"vit.{site}.weight" for site in sites]
    parameters = {k: v.detach() for k, v in vit.named_parameters()}
    wanted = {k: parameters[k] for k in names}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(vit, {**parameters, **weights}, (image[None],))
        return F.cross_entropy(logits, label[None])

    with evaluating(vit):
        func = seconds(lambda: vmap(grad(loss), in_dims=(None, 0, 0))(wanted, images, labels))
        outer = seconds(lambda: sample_gradients(vit, images, labels, sites))
    print("gradients of each of 32 images, all layers of a ViT-Ti at 64 x 64")
    show(("torch.func: vmap of grad", func), ("outer products of one backward pass", outer))


def memory() -> None:
    """Peak memory of the process before and after CAP on a DeiT-S with 64 x 64 images."""
    vit = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False, img_size=64)
    batches = [
        (torch.randn(64, 3, 64, 64), torch.randint(1000, (64,))) for _ in range(GRADIENTS // 64)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    cap = load_method("cap", block=BLOCK)
    shares = dict.fromkeys(cap.sites(vit.shape()), 0.5)
    Plan(steps=(Step(pruner=cap, thresholds=shares),)).apply(vit, batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    weights = sum(layer.weight.numel() for _, layer in vit.linears())
    print(f"CAP on {weights / 1e6:.1f} M weights, blocks of {BLOCK}, {GRADIENTS} gradients:")
    print(
        f"  {peak:.2f} GB at the peak, {before:.2f} GB before, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    torch.set_num_threads(2)
    memory() if parser.parse_args().memory else times()
