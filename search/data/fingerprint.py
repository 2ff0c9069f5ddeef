"""Digests of a sweep's model and images: ones that change under a sweep are never used."""

from __future__ import annotations

from pruners import PrunableViT
from search.data.images import data_digest
from search.data.model import image_spec
from search.records.digests import json_digest, tensors_digest
from search.sweep.spec import Sweep

SPLITS = ("train", "val", "test")


def fingerprint(sweep: Sweep, dense: PrunableViT) -> dict[str, str]:
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
