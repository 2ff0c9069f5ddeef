"""Images per second on this CPU: fused or plain attention, float32 or bfloat16.

    python tests/benchmarks/training_speed.py

The sample's ViT, batch 128, one thread. Everything is measured in one run, several times in turn,
and given relative to the first row: machines are noisy, ratios less so.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from pruners import PrunableViT
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe

MODEL = Path(__file__).parents[2] / "search" / "sample" / "vit_cifar10.safetensors"
ROUNDS, BATCHES, BATCH = 5, 3, 128


def train_rate(fused: bool, precision: str) -> float:
    vit = PrunableViT.from_safetensors(MODEL)
    tuner = FineTuner(
        vit, Recipe(epochs=1, distill=0.0, precision=precision), steps_per_epoch=BATCHES
    )
    vit.use_fused_attention(fused)
    data = [(torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))) for _ in range(BATCHES)]
    tuner.train_epoch(data[:1])
    start = time.perf_counter()
    tuner.train_epoch(data)
    return BATCHES * BATCH / (time.perf_counter() - start)


def evaluation_rate(fused: bool) -> float:
    vit = PrunableViT.from_safetensors(MODEL)
    vit.use_fused_attention(fused)
    data = [(torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))) for _ in range(BATCHES)]
    return evaluate(vit, data).images_per_s


def main() -> None:
    torch.set_num_threads(1)
    cases = {
        "train, fused, float32": lambda: train_rate(True, "float32"),
        "train, plain, float32": lambda: train_rate(False, "float32"),
        "train, fused, bfloat16": lambda: train_rate(True, "bfloat16"),
        "train, plain, bfloat16": lambda: train_rate(False, "bfloat16"),
        "evaluate, fused, float32": lambda: evaluation_rate(True),
        "evaluate, plain, float32": lambda: evaluation_rate(False),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, measure in cases.items():
            rates[name].append(measure())
    print(f"{'':26} images/s (median of {ROUNDS})   of the first row of its kind")
    for name, values in rates.items():
        kind = name.partition(",")[0]
        base = next(v for n, v in rates.items() if n.startswith(kind))
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"{name:26} {statistics.median(values):12.0f} {ratio:24.2f}x")


if __name__ == "__main__":
    main()
