"""Real speed of token reduction on a model of DeiT-S size: images/s against the dense model.

    python tests/benchmarks/token_speed.py

Every method reduces tokens to half of the dense MACs, as it proposes itself. Each is timed in turn
with the dense model, in the same run; the median of the ratios stands beside the ratio of the MACs.
The last columns say where the time goes: what the reducers take of the forward pass, measured by
timing them, and what they take of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from speed import in_turn, rate

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.model.tokens import TokenReducer

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "evit": ("evit", {}),
    "tome": ("tome", {}),
    "pitome": ("pitome", {}),
    "mctf": ("mctf", {}),
    "dynamic_vit": ("dynamic_vit", {}),
    "spvit": ("spvit", {}),
    "cait_tokens": ("cait_tokens", {}),
    "cait_tokens, mean": ("cait_tokens", {"merge": "mean"}),
}


class Stopwatch:
    """Sums the time between a module's call and its return."""

    def __init__(self, vit: PrunableViT) -> None:
        self.seconds = 0.0
        self.hooks = []
        for module in vit.modules():
            if isinstance(module, TokenReducer):
                self.hooks += [
                    module.register_forward_pre_hook(self._start),
                    module.register_forward_hook(self._stop),
                ]

    def _start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def reducers_share(vit: PrunableViT, images: torch.Tensor) -> float:
    """Share of a forward pass that is spent in the reducers, on the CPU."""
    watch = Stopwatch(vit)
    seconds = len(images) / rate(vit, images)
    watch.remove()
    return watch.seconds / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dense = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).eval()
    images, macs = torch.randn(args.batch, 3, 224, 224), cost_of(dense.shape()).macs
    print("| method | images/s | MACs | of the possible | reducers, of the time | of the MACs |")
    print("|---|---|---|---|---|---|")
    for name in args.methods:
        method, options = CASES[name]
        vit, pruner = copy.deepcopy(dense), load_method(method, **options)
        thresholds = pruner.allocate(vit.shape(), {}, args.budget * macs)
        Plan(steps=(Step(pruner=pruner, thresholds=thresholds),)).apply(vit)
        shape = vit.shape()
        _, faster = in_turn(vit, dense, images, args.rounds)
        fewer = macs / cost_of(shape).macs
        inside = statistics.median(reducers_share(vit, images) for _ in range(3))
        own = sum(block.reducer_macs for block in shape.blocks) / cost_of(shape).macs
        print(
            f"| {name} | {faster:.2f}x | {fewer:.2f}x fewer | {100 * faster / fewer:.0f} % | "
            f"{100 * inside:.1f} % | {100 * own:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
