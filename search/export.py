"""Exports a trial's model in all formats, checked and measured; all or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from pruners import PrunableViT, cost_of
from pruners.checkpoint import SHAPE, WEIGHTS, read_description
from pruners.export.onnx import TOLERANCE, Agreement, agreement, write_onnx, write_program
from pruners.export.semi_structured import is_two_of_four, semi_structured_layers
from pruners.export.timm import SCRIPT, why_not, write_timm
from pruners.export.timm import WEIGHTS as TIMM_WEIGHTS
from pruners.model.files import replace_directory
from search.data.splits import open_split
from search.export_speed import Speed, measure_speed
from search.records.files import read_trials
from search.records.trial_record import TrialRecord
from search.sweep.toml import load_sweep
from search.tracking.served import measurements
from search.trial.trial_files import check_model

PROGRAM, ONNX = "model.pt2", "model.onnx"
SEMI_STRUCTURED, MEASURED = "semi_structured.json", "measured.json"
FILES = {WEIGHTS, SHAPE, PROGRAM, ONNX, TIMM_WEIGHTS, SCRIPT, SEMI_STRUCTURED, MEASURED}
"""Files that an export may write."""

IMAGES = 64


def export_trial(directory: Path, trial: str, out: Path, stream: TextIO) -> None:
    """Write the model of a sweep's trial to a directory, and print its files.

    An older export is replaced; where anything goes wrong, it stays as it is.

    Args:
        directory: The sweep's.
        trial: The trial, as the front names it.
        out: The directory to write.
        stream: Where the files are printed, a line for each.

    Raises:
        FileNotFoundError: If there is no such sweep.
        ValueError: If the trial has no model, if `out` holds anything but an export, or if the ONNX
            file does not compute the model's logits.
    """
    records = {record.trial: record for record in read_trials(directory / "trials.parquet")}
    record = _finished(records, trial, directory)
    dense = next((each for each in records.values() if each.status == "dense"), None)
    if dense is None:
        raise ValueError(f"{directory} has no dense model yet; give a sweep whose first trial ran")
    check_replaceable(out)
    models = _opened(directory, record), _opened(directory, dense)
    images, source = example_images(directory, models[0])

    def write(folder: Path) -> Written:
        written = _write(folder, record, models, images)
        _write_json(folder / MEASURED, written.to_json(trial, source))
        return written

    try:
        written = replace_directory(out, write)
    except ImportError as error:
        raise ValueError(str(error)) from error
    for line in _summary(written, record, out, source):
        print(line, file=stream)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Results of an export.

    Attributes:
        agreement: Agreement of the ONNX file's logits with PyTorch's.
        no_timm: Reason why there are no files for timm; empty if there are.
        semi_structured: Layer -> backend -> "taken", or why not; empty if no weights are 2:4.
        fewer: MACs of the dense model / MACs.
        speeds: Measured speeds.
    """

    agreement: Agreement
    no_timm: str
    semi_structured: dict[str, dict[str, str]]
    fewer: float
    speeds: list[Speed]

    def to_json(self, trial: str, source: str) -> dict[str, Any]:
        """Return the values of `measured.json`."""
        return {
            "trial": trial,
            "images": source,
            "largest_difference": self.agreement.difference,
            "images_within_tolerance": self.agreement.within,
            "tolerance": TOLERANCE,
            "times_fewer_macs": self.fewer,
            "threads": torch.get_num_threads(),
            "speed": [speed.to_json() for speed in self.speeds],
        }


def _finished(records: dict[str, TrialRecord], trial: str, directory: Path) -> TrialRecord:
    record = records.get(trial)
    if record is None:
        raise ValueError(f"trial {trial!r} is not in {directory}; give one of {list(records)}")
    if not record.checkpoint or record.status not in ("finished", "dense"):
        raise ValueError(f"trial {trial} is {record.status}; give one that finished")
    return record


def _opened(directory: Path, record: TrialRecord) -> PrunableViT:
    check_model(directory / record.checkpoint)
    vit = PrunableViT.load(directory / record.checkpoint).eval()
    vit.use_fused_attention(True)
    return vit


def example_images(directory: Path, vit: PrunableViT) -> tuple[Tensor, str]:
    """Return validation images [B, channels, height, width] of a sweep, or random ones, and which.

    Random ones, always the same, are returned where the sweep's data cannot be read from here.
    """
    try:
        sweep = load_sweep(directory / "sweep.toml")
        # Streamed: only the first images are wanted, not the whole split decoded.
        data = sweep.data.model_copy(update={"cache_gb": 0.0})
        split = open_split(sweep.model_copy(update={"data": data}), vit, "val")
        batches = split.batches(IMAGES, seed=None, augment=False)
        ((images, _),) = islice(batches, 1)
    except (OSError, ValueError) as error:
        shape = vit.shape()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(IMAGES, shape.channels, *shape.image, generator=generator)
        return images, f"{IMAGES} random images ({error})"
    return images, f"{len(images)} validation images"


def _write(
    folder: Path, record: TrialRecord, models: tuple[PrunableViT, PrunableViT], images: Tensor
) -> Written:
    vit, dense = models
    vit.save(folder, measurements(record))
    write_program(vit, folder / PROGRAM)
    write_onnx(vit, folder / ONNX)
    agrees = agreement(folder / ONNX, vit, images)
    if agrees.reason:
        raise ValueError(f"{ONNX} is wrong: {agrees.reason}")
    if not (no_timm := why_not(vit)):
        write_timm(vit, folder)
    if layers := _semi_structured(vit):
        _write_json(folder / SEMI_STRUCTURED, layers)
    dense_file = folder / f"dense.{ONNX}"
    write_onnx(dense, dense_file)
    speeds = measure_speed(dense, vit, (dense_file, folder / ONNX), images)
    dense_file.unlink()
    return Written(
        agreement=agrees,
        no_timm=no_timm,
        semi_structured=layers,
        fewer=cost_of(dense.shape()).macs / cost_of(vit.shape()).macs,
        speeds=speeds,
    )


def _semi_structured(vit: PrunableViT) -> dict[str, dict[str, str]]:
    if not any(is_two_of_four(layer.weight) for _, layer in vit.linears()):
        return {}
    return {
        site: {backend: reason or "taken" for backend, reason in reasons.items()}
        for site, reasons in semi_structured_layers(vit).items()
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1))


def check_replaceable(out: Path) -> None:
    """Check that a directory is free, or holds an older export.

    Raises:
        ValueError: If there is anything else; it is named.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise ValueError(f"--out {out} is no directory; give a new one, or an older export")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    if other := sorted(found - FILES):
        raise ValueError(f"--out {out} holds {other[0]}, which no export wrote; give another one")
    if "trial" not in read_description(out).get("measured", {}):
        raise ValueError(f"--out {out} holds a model that no export wrote; give another one")


def _summary(written: Written, record: TrialRecord, out: Path, source: str) -> list[str]:
    accuracy = f"validation {record.val_top1:.1f} %"
    if record.test_top1 is not None:
        accuracy += f", test {record.test_top1:.1f} %"
    agrees = written.agreement
    differ = f"logits differ by {agrees.difference:.1e} at most"
    near = f", {agrees.within} of {agrees.images} within {TOLERANCE:g}"
    near = "" if agrees.within == agrees.images else near
    rows = {
        f"{WEIGHTS}, {SHAPE}": "the model, and what is known of it",
        PROGRAM: "for torch.export.load",
        ONNX: f"for onnxruntime; {differ} on {source}{near}",
        f"{TIMM_WEIGHTS}, {SCRIPT}": "for timm alone",
    }
    if written.no_timm:
        rows[f"{TIMM_WEIGHTS}, {SCRIPT}"] = f"not written: {written.no_timm}"
    if layers := written.semi_structured:
        taken = sum("taken" in backends.values() for backends in layers.values())
        rows[SEMI_STRUCTURED] = f"{taken} of {len(layers)} layers fit sparse tensor cores"
    faster = ", ".join(f"{s.faster:.2f}x in {s.runtime} at {s.batch}" for s in written.speeds)
    rows[MEASURED] = f"{written.fewer:.2f}x fewer MACs; images/s {faster} images at once"
    return [
        f"wrote {out}, trial {record.trial}: {accuracy}; {record.plan_line}",
        *(f"  {name}: {what}" for name, what in rows.items()),
        "use it:",
        "  from pruners import PrunableViT",
        f'  vit = PrunableViT.load("{out}").eval()',
        "  logits = vit(images)  # normalised by vit.mean and vit.std",
    ]
