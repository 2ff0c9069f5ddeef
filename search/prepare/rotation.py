"""The dense model turned to its stream's principal directions (`model.rotate`), as a Ray task.

The turned model is kept beside the sweeps by a digest of all its inputs: a sweep that is resumed
goes on with the very same weights, and other sweeps reuse them.
"""

from __future__ import annotations

from pathlib import Path

import ray
import torch

from pruners import PrunableViT
from pruners.checkpoint import SHAPE
from search.data.images import Images
from search.data.splits import calibration_batches, open_split, trial_device
from search.prepare.learning import FOLDER
from search.prepare.task import cause_of, worker_task
from search.records.digests import json_digest, tensors_digest
from search.sweep.spec import Sweep, SweepFailedError


def turned(sweep: Sweep, dense: PrunableViT) -> PrunableViT:
    """Return the dense model of a sweep's trials: turned, if the sweep asks for that.

    Args:
        sweep: The sweep.
        dense: Its dense model, which `check_turns` takes, on the CPU.

    Raises:
        SweepFailedError: If it cannot be turned.
    """
    if not sweep.model.rotate:
        return dense
    turn = worker_task(sweep, turn_once)
    try:
        path = ray.get(turn.remote(sweep, dense, Path(sweep.storage).resolve() / FOLDER))
    except ray.exceptions.RayError as error:
        raise SweepFailedError(
            f"model.rotate: the model could not be turned: {cause_of(error)}"
        ) from error
    return PrunableViT.load(path)


def turn_once(sweep: Sweep, dense: PrunableViT, folder: Path) -> Path:
    """Turn, or find what was turned from the same; return the directory of the turned model."""
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    train = open_split(sweep, dense, "train")
    path = folder / f"rotated-{rotation_digest(sweep, dense, train)[:24]}"
    if not (path / SHAPE).exists():  # written last
        device = trial_device(sweep)
        batches = list(calibration_batches(sweep, train, device))
        dense.to(device).rotated(batches).save(path)
    return path


def rotation_digest(sweep: Sweep, dense: PrunableViT, train: Images) -> str:
    """Return the SHA-256 of all inputs of a turned model: model, images, their order."""
    decisive = {
        "shape": dense.shape().to_json(),
        "weights": tensors_digest(dense.vit.state_dict()),
        "train": train.digest,
        "batch_size": sweep.data.batch_size,
        "calibration": sweep.data.calibration,
        "seed": sweep.seed,
    }
    return json_digest(decisive)
