"""Small sweeps: a whole one, and the shortest TOML."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.images import labelled, write_images
from tests.models import TINY, build_tiny

SWEEP_TOML = """
name = "tiny"
budget = [0.5, 0.9]
trials = 6
ladder = 2
alone = 0
epochs = 1
register_front = false
storage = "{folder}/results"

[model]
path = "{folder}/vit.safetensors"
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[data]
train = "{folder}/train.parquet"
val = "{folder}/val.parquet"
test = "{folder}/test.parquet"
batch_size = 16
calibration = 32
cache_dir = "{folder}/cache"

[[steps]]
method = "grouped"

[[steps]]
method = "evit"

[[steps]]
method = "magnitude"
"""


def write_sweep(folder: Path, train: int = 80) -> Path:
    """Write a whole small sweep: model, data (so many training images) and TOML."""
    for seed, (split, count) in enumerate((("train", train), ("val", 40), ("test", 30))):
        write_images(folder / f"{split}.parquet", *labelled(count, seed))
    args = {**TINY, "patch_size": 4}  # 24 patches
    state = {key: value.contiguous() for key, value in build_tiny(**args).vit.state_dict().items()}
    save_file(state, folder / "vit.safetensors", {"arch": json.dumps(args)})
    path = folder / "tiny.toml"
    path.write_text(SWEEP_TOML.format(folder=folder))
    return path


MINIMAL = """
name = "a"
budget = [0.3, 0.8]
trials = 4
epochs = 1
model.name = "vit_tiny_patch16_224"
data = { train = "t", val = "v", test = "s" }
steps = [{ method = "magnitude", scope = "layer" }]
"""
