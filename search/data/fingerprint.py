"""What a sweep is about, as digests: a model or images that change under it are never used."""

from __future__ import annotations

from collections.abc import Mapping

from pruners import PrunableViT
from search.digests import json_digest, tensors_digest
from search.model import image_spec
from search.parquet import data_digest
from search.sweep import Sweep, SweepError

SPLITS = ("train", "val", "test")


def identity(sweep: Sweep, dense: PrunableViT) -> dict[str, str]:
    """Return the SHA-256 of the dense model and of each split, by the sweep's keys."""
    model = {"shape": dense.shape().to_json(), "weights": tensors_digest(dense.vit.state_dict())}
    data = sweep.data
    splits = {
        f"data.{split}": data_digest(
            getattr(data, split),
            image_spec(dense),
            cache_gb=data.cache_gb,
            image_column=data.image_column,
            label_column=data.label_column,
        )
        for split in SPLITS
    }
    return {"model": json_digest(model), **splits}


def refuse_another(began: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Refuse to go on with another model or other images than a sweep began with.

    Raises:
        SweepError: For the first that has changed.
    """
    for key, digest in began.items():
        if now.get(key) != digest:
            raise SweepError(
                f"{key} has changed since sweep {name} began (SHA-256 {digest[:12]} then, "
                f"{str(now.get(key))[:12]} now); put it back, or give the sweep another name"
            )
