"""Real speed of unit pruning on a model of DeiT-S size: images/s against the dense model.

    python tests/benchmarks/unit_speed.py

Random scores, so that the kept sizes are as uneven as they get. Each row is timed in turn with the
dense model, in the same run; the median of the ratios is printed beside the ratio of the MACs that
dense kernels run (padding included) and of the MACs without the padding.
"""

from __future__ import annotations

import argparse
import copy

import torch
from speed import in_turn

from pruners import PrunableViT, cost_of
from pruners.families.unit import UnitPruner
from pruners.methods.uvc import UVC
from pruners.methods.vit_slim import ViTSlim
from pruners.methods.x_pruner import XPruner

CASES: dict[str, UnitPruner] = {
    "heads and neurons": XPruner(),
    "same number of dims in each head": ViTSlim(units=("dim", "neuron")),
    "ragged dims": ViTSlim(),
    "ragged dims, multiple of 8": ViTSlim(multiple=8),
    "ragged v dims and heads": UVC(units=("ragged_v_dim", "neuron")),
    "ragged v dims and heads, multiple of 8": UVC(units=("ragged_v_dim", "neuron"), multiple=8),
}


def scored(method: UnitPruner, vit: PrunableViT) -> dict[str, torch.Tensor]:
    generator, shape = torch.Generator().manual_seed(0), vit.shape()
    scores = {}
    for site, units in method.sites(shape).items():
        own = torch.rand(units, generator=generator) + 0.3 * torch.rand(1, generator=generator)
        heads = shape.blocks[int(site.split(".")[1])].heads
        scores[site] = own.expand(heads, -1) if site.endswith("attn.dim") else own
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dense = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).eval()
    images, macs = torch.randn(args.batch, 3, 224, 224), cost_of(dense.shape()).macs
    print("| units | images/s | MACs run | MACs needed | of the possible |")
    print("|---|---|---|---|---|")
    for name, method in CASES.items():
        vit = copy.deepcopy(dense)
        scores = scored(method, vit)
        method.cut(vit, scores, method.allocate(vit.shape(), scores, args.budget * macs))
        _, faster = in_turn(vit, dense, images, args.rounds)
        run, needed = (
            macs / c for c in (cost_of(vit.shape()).macs, cost_of(vit.shape()).effective_macs)
        )
        print(
            f"| {name} | {faster:.2f}x | {run:.2f}x fewer | {needed:.2f}x fewer | "
            f"{100 * faster / run:.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
