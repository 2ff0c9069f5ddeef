"""Members of a front as MLflow models, which serve without this project's code and torch.

Each is a directory below the sweep's: an ONNX file that MLflow itself loads, with signature, input
example and metadata; as extra files, those of `PrunableViT.save`. Nothing in it is pickled.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.onnx
import numpy as np
import onnx
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor

from pruners import PrunableViT
from pruners.checkpoint import SHAPE, WEIGHTS
from pruners.export.onnx import OUTPUT, agreement, write_onnx
from pruners.model.files import replace_directory, replace_file
from search.data.splits import open_split
from search.records.atomic import writing_to
from search.records.digests import DAMAGE, directory_digest, file_digest, read_sealed, sealed
from search.records.trial_record import TrialRecord
from search.sweep.spec import Sweep
from search.trial.trial_files import check_model

SERVED = "served"
"""Folder of a sweep's directory that holds a folder and a note for each member."""

ONNX = "model.onnx"
"""The file in such a folder that is served, as `mlflow.onnx` names it."""

EXAMPLES = 2
"""Validation images in the input example, which is text: 3 MB for one of 3 x 224 x 224."""

COMPARED = 16
"""Validation images whose logits are compared with PyTorch's; a wrong export fails on any."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The MLflow model of a trial.

    Attributes:
        trial: The trial.
        directory: The model.
        digest: SHA-256 of its files, as they were when it was compared.
        difference: Largest absolute difference between its logits in onnxruntime and PyTorch's.
        reason: Reason why it is not verified; empty if it is.
    """

    trial: str
    directory: Path
    digest: str
    difference: float
    reason: str

    @property
    def verified(self) -> bool:
        """Whether its logits are those of the trial's model."""
        return not self.reason


def make_served(
    sweep: Sweep,
    member: TrialRecord,
    cost_ratio: float,
    digests: Mapping[str, str],
    test_top1: float,
) -> Served:
    """Make the MLflow model of a member of the front, unless it is there.

    Args:
        sweep: The sweep, whose directory all nodes see.
        member: The member.
        cost_ratio: Its cost as a share of the dense model's.
        digests: SHA-256 of the dense model and of each split, by the sweep's keys.
        test_top1: Percent.

    Raises:
        ValueError: If the trial's model is damaged, or too large for an ONNX file.
        SweepFailedError: If the sweep's directory cannot be written to.
    """
    source = sweep.directory.resolve() / member.checkpoint
    check_model(source)
    folder, weights = sweep.directory.resolve() / SERVED, file_digest(source / WEIGHTS)
    if (found := read_served(folder, member.trial, weights)) is not None:
        return found
    torch.set_num_threads(max(1, int(sweep.resources.cpu)))
    vit = PrunableViT.load(source).eval()
    split = open_split(sweep, vit, "val")
    images, _ = next(split.batches(COMPARED, seed=None, augment=False))
    measured = measurements(dataclasses.replace(member, test_top1=test_top1))
    metadata = {
        **measured,
        **_described(sweep, member, cost_ratio),
        "mean": list(vit.mean or ()),
        "std": list(vit.std or ()),
        "digests": dict(digests),
    }
    if names := split.shards.classes:
        metadata["classes"] = list(names)
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f".{member.trial}.*"):  # by a process that was killed
            shutil.rmtree(left)

        def write(temporary: Path) -> dict[str, Any]:
            _write(temporary, vit, images[:EXAMPLES], measured, metadata)
            agrees = agreement(temporary / ONNX, vit, images)
            return {
                "weights": weights,
                "difference": agrees.difference,
                "reason": agrees.reason,
                "files": directory_digest(temporary),
            }

        note = replace_directory(folder / member.trial, write)
        replace_file(_note(folder, member.trial), lambda path: path.write_text(sealed(note)))
    return _served(folder, member.trial, note)


def read_served(folder: Path, trial: str, weights: str) -> Served | None:
    """Return the MLflow model of a trial; None if none of these weights is there, whole.

    Args:
        folder: Where the models of the sweep lie.
        trial: The trial.
        weights: SHA-256 of the file of its weights.
    """
    try:
        note = read_sealed(_note(folder, trial))
        if note["weights"] != weights:
            return None
        served = _served(folder, trial, note)
    except DAMAGE:
        return None
    return served if directory_digest(served.directory) == served.digest else None


def measurements(record: TrialRecord) -> dict[str, Any]:
    """Return the fields of a trial in the `shape.json` of its exported model."""
    return {
        "trial": record.trial,
        "plan": record.plan,
        "val_top1": record.val_top1,
        "test_top1": record.test_top1,
        "images_per_s": record.images_per_s,
        "epochs": record.epochs,
    }


def _described(sweep: Sweep, member: TrialRecord, cost_ratio: float) -> dict[str, Any]:
    """Return the fields of the metadata that name a model's sweep, plan and costs."""
    return {
        "sweep": sweep.name,
        "plan_line": member.plan_line,
        "cost": sweep.cost,
        "cost_ratio": cost_ratio,
        "gmacs": member.gmacs,
        "effective_gmacs": member.effective_gmacs,
        "params": member.params,
    }


def _write(
    directory: Path,
    vit: PrunableViT,
    examples: Tensor,
    measured: dict[str, Any],
    metadata: dict[str, Any],
) -> None:
    """Write an MLflow model; `examples` [B, channels, height, width] are its input example."""
    shape = vit.shape()
    inputs = TensorSpec(np.dtype(np.float32), (-1, shape.channels, *shape.image))
    outputs = TensorSpec(np.dtype(np.float32), (-1, shape.classes), OUTPUT)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as parts:
        vit.save(Path(parts), measured)
        write_onnx(vit, Path(parts) / ONNX)
        mlflow.onnx.save_model(
            onnx.load(Path(parts) / ONNX),
            directory,
            signature=ModelSignature(Schema([inputs]), Schema([outputs])),
            input_example=examples.numpy(),
            pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # else it tries them out
            onnx_execution_providers=["CPUExecutionProvider"],
            metadata=metadata,
            save_as_external_data=False,
            extra_files=[str(Path(parts) / name) for name in (WEIGHTS, SHAPE)],
        )


def _note(folder: Path, trial: str) -> Path:
    return folder / f"{trial}.json"


def _served(folder: Path, trial: str, note: Mapping[str, Any]) -> Served:
    return Served(
        trial=trial,
        directory=folder / trial,
        digest=str(note["files"]),
        difference=float(note["difference"]),
        reason=str(note["reason"]),
    )
