from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import PrunableViT

TINY = {
    "img_size": (24, 16),  # not square, so that heights and widths cannot be confused
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}

VARIANTS: dict[str, dict[str, object]] = {
    "vit": {},
    "layer_scale": {"init_values": 0.3, "no_embed_class": True},
    "registers": {"reg_tokens": 2, "init_values": 0.5},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "qk_norm": {"qk_norm": True},
    "grey_no_bias": {"in_chans": 1, "qkv_bias": False, "pre_norm": True},
}


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build_tiny(**args: object) -> PrunableViT:
    """Build a tiny model whose every parameter is random, so that no term is silently zero."""
    torch.manual_seed(1)
    args = {**TINY, **args}
    vit = PrunableViT.from_state_dict(VisionTransformer(**args).state_dict(), **args)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return vit.eval()


@pytest.fixture
def tiny() -> Callable[..., PrunableViT]:
    """Builds a tiny model."""
    return build_tiny


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(6, 3, 24, 16, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(3)
    ]


def images_for(vit: PrunableViT, count: int = 3) -> Tensor:
    shape = vit.shape()
    return torch.randn(
        count, shape.channels, *shape.image, generator=torch.Generator().manual_seed(3)
    )


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def random_pixels(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_images(
    path: Path, files: list[bytes | None], labels: list[int], group: int = 10_000
) -> Path:
    """Write a Parquet file in the Hugging Face image schema."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{path.stem}/{i}.png"} for i, data in enumerate(files)]
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=group)
    return path


def labelled(count: int, seed: int) -> tuple[list[bytes | None], list[int]]:
    """Images of five classes that differ in brightness, so that there is something to learn."""
    labels = [(i * 7 + seed) % 5 for i in range(count)]
    noise = random_pixels(count, 24, 16, seed).astype(int) - 128
    pixels = [np.clip(25 + 50 * c + n // 4, 0, 255) for c, n in zip(labels, noise, strict=True)]
    return [png(p.astype(np.uint8)) for p in pixels], labels


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


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """A whole small sweep."""
    return write_sweep(tmp_path)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests."""
    import ray

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()
