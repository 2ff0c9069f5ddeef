"""Real speed of exported models of DeiT-S size: images/s against the dense model.

    python tests/benchmarks/export_speed.py

Units, tokens, or both go until half of the dense MACs are left: units of random scores, so that
every block has sizes of its own; tokens as their methods propose. All models run in turn, in
PyTorch and in onnxruntime, with the same number of threads. The quotient is the median over the
rounds of (dense seconds / seconds) / (dense MACs / MACs): 1 means that all MACs saved are time
saved.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
from pathlib import Path

import torch

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.export.onnx import agreement, onnx_call, write_onnx
from pruners.latency.timing import Call, forward_call, seconds_in_turn

CASES: dict[str, tuple[float, str | None]] = {  # share of the MACs that units leave; token method
    "units": (0.5, None),
    "evit": (1.0, "evit"),
    "tome": (1.0, "tome"),
    "dynamic_vit": (1.0, "dynamic_vit"),
    "cait_tokens": (1.0, "cait_tokens"),
    "units + evit": (0.7, "evit"),
    "units + tome": (0.7, "tome"),
}


def cut(dense: PrunableViT, units: float, tokens: str | None, budget: float) -> PrunableViT:
    vit, macs = copy.deepcopy(dense), cost_of(dense.shape()).macs
    if units < 1.0:
        grouped, generator = load_method("grouped"), torch.Generator().manual_seed(0)
        scores = {}
        for site, count in grouped.sites(vit.shape()).items():
            own = torch.rand(count, generator=generator) + 0.3 * torch.rand(1, generator=generator)
            # As grouped sums over a unit's weights: a head has 128 times those of a neuron.
            scores[site] = own * (128.0 if site.endswith("head") else 1.0)
        share = units if tokens else budget
        grouped.cut(vit, scores, grouped.allocate(vit.shape(), scores, share * macs))
    if tokens is not None:
        pruner = load_method(tokens)
        thresholds = pruner.allocate(vit.shape(), {}, budget * macs)
        Plan(steps=(Step(pruner=pruner, thresholds=thresholds),)).apply(vit)
    return vit


def table(calls: dict[str, Call], fewer: dict[str, float], runtime: str, batch: int, rounds: int):
    seconds = dict(zip(calls, seconds_in_turn(list(calls.values()), rounds=rounds), strict=True))
    for name, taken in seconds.items():
        faster = statistics.median(
            dense / own for dense, own in zip(seconds["dense"], taken, strict=True)
        )
        print(
            f"| {name} | {runtime} | {batch} | {batch / statistics.median(taken):.1f} | "
            f"{faster:.2f}x | {fewer[name]:.2f}x fewer | {faster / fewer[name]:.2f} |",
            flush=True,
        )


def layer_seconds(tokens: int, layers: int = 48) -> float:
    """Return the median seconds of one 384 x 1536 layer, each with weights of its own, in PyTorch.

    It says what does not shrink with the tokens: every call reads and packs all weights.
    """
    weights = [torch.randn(1536, 384) for _ in range(layers)]
    x, bias = torch.randn(1, tokens, 384), torch.randn(1536)

    def call() -> None:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(x, weight, bias)

    (seconds,) = seconds_in_turn([call], rounds=10)
    return statistics.median(seconds) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--images", type=int, default=256, help="per model, in each of the tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).eval()
    models = {"dense": dense}
    models |= {name: cut(dense, *CASES[name], args.budget).eval() for name in args.cases}
    macs = {name: cost_of(vit.shape()).macs for name, vit in models.items()}
    fewer = {name: macs["dense"] / own for name, own in macs.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(models)}
        for name, vit in models.items():
            write_onnx(vit, files[name])
            difference = agreement(files[name], vit, torch.randn(2, 3, 224, 224)).difference
            print(f"{name}: logits differ by {difference:.1e} at most", flush=True)
        print(f"load before: {os.getloadavg()[0]:.1f}; {args.threads} threads\n")
        print("| model | runtime | batch | images/s | faster | MACs | quotient |")
        print("|---|---|---|---|---|---|---|")
        for batch in args.batches:
            images, rounds = torch.randn(batch, 3, 224, 224), max(3, min(30, args.images // batch))
            eager = {name: forward_call(vit, images) for name, vit in models.items()}
            table(eager, fewer, "PyTorch", batch, rounds)
            onnx = {name: onnx_call(path, images) for name, path in files.items()}
            table(onnx, fewer, "onnxruntime", batch, rounds)
        times = ", ".join(f"{1e3 * layer_seconds(n):.2f} ms for {n} tokens" for n in (25, 197))
        print(f"\na linear layer of 384 x 1536 in PyTorch: {times}")
        print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
