"""What a trial leaves on the sweep's storage after each epoch: its model, and what resuming needs.

A trial that has to go in the middle of an epoch leaves the same.

Ray's own checkpoints are not used: whenever a trial has written two, Ray takes a snapshot of all
trials, which takes longer the more there are. What lies here is found by the trial's name.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruners import PrunableViT
from pruners.checkpoint import SHAPE, WEIGHTS
from pruners.model.files import replace_directory
from search.records.atomic import writing_to
from search.records.digests import DAMAGE, file_digest, json_digest, read_sealed, sealed
from search.records.trial_record import MODELS, model_name

RESULTS, TUNER, HUNG = "results.json", "tuner.pt", "hung.txt"
DECISIVE = ("plan", "origin", "epochs", "seed", "learned", "cost_ratio")
"""What of a configuration decides what comes of a trial."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a trial had come to.

    Attributes:
        results: What it reported, epoch by epoch.
        directory: Its model, as `PrunableViT.save` wrote it.
        tuner: State of its `FineTuner`, perhaps in the middle of an epoch; None if it has ended.
        seconds: What it had run.
    """

    results: list[dict[str, Any]]
    directory: Path
    tuner: dict[str, Any] | None
    seconds: float


class TrialFiles:
    """The files of one trial."""

    def __init__(self, sweep_directory: Path, config: dict[str, Any]) -> None:
        """Name the files of the trial with this configuration; nothing is read or written."""
        self.directory = sweep_directory / MODELS / config["trial"]
        self.identity = json_digest({key: config.get(key) for key in DECISIVE})

    def save(
        self,
        vit: PrunableViT,
        results: list[dict[str, Any]],
        tuner: dict[str, Any] | None,
        seconds: float,
    ) -> None:
        """Write what a trial has come to; what it had come to before is removed.

        Raises:
            SweepFailedError: If the directory cannot be written to.
        """
        with writing_to(self.directory):
            last, steps = results[-1], tuner["steps"] if tuner is not None else 0
            target = self.directory / model_name(last["epoch"], steps)

            def write(folder: Path) -> None:
                vit.save(folder, measured={"val_top1": last["val_top1"], "epoch": last["epoch"]})
                if tuner is not None:
                    content = io.BytesIO()  # torch.save to a full disk raises no OSError
                    torch.save(tuner, content)
                    (folder / TUNER).write_bytes(content.getvalue())
                digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
                saved = {
                    "identity": self.identity,
                    "digests": digests,
                    "results": results,
                    "seconds": seconds,
                }
                (folder / RESULTS).write_text(sealed(saved))

            replace_directory(target, write)  # also of another trial of this name
            for other in self.directory.iterdir():
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Saved | None:
        """Return what this very trial had come to; None if nothing of it is there.

        Raises:
            ValueError: If a file is not what was written, in one line.
        """
        found = sorted(self.directory.glob("epoch-*"))
        if not found:
            return None
        path = found[-1] / RESULTS
        try:
            saved = read_sealed(path)
            if saved["identity"] != self.identity:
                return None
            digests, results = dict(saved["digests"]), list(saved["results"])
            ended, seconds = results[-1]["status"] != "running", float(saved["seconds"])
        except DAMAGE as error:
            raise ValueError(_damaged(path)) from error
        expected = {WEIGHTS, SHAPE} if ended else {WEIGHTS, SHAPE, TUNER}
        if digests.keys() != expected:
            raise ValueError(_damaged(path))
        _check_digests(path.parent, digests)
        tuner = None
        if not ended:
            tuner = _tuner_state(path.parent / TUNER)
        return Saved(results=results, directory=path.parent, tuner=tuner, seconds=seconds)


def hung_path(trial: str) -> str:
    """Return where it is written where a trial hung, below the sweep's directory."""
    return f"{MODELS}/{trial}/{HUNG}"


def check_model(directory: Path) -> None:
    """Check that a model that a trial left is what was written.

    Raises:
        ValueError: If a file is not, in one line.
    """
    path = directory / RESULTS
    try:
        digests = read_sealed(path)["digests"]
        wanted = {name: digests[name] for name in (WEIGHTS, SHAPE)}
    except DAMAGE as error:
        raise ValueError(_damaged(path)) from error
    _check_digests(directory, wanted)


def _tuner_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and its unpickler raise what comes
        raise ValueError(f"{path} is no tuner's state, read with weights_only") from error
    if not isinstance(state, dict):
        raise ValueError(_damaged(path))
    return state


def _check_digests(directory: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file() or file_digest(path) != digest:
            raise ValueError(_damaged(path))


def _damaged(path: Path) -> str:
    return f"{path} is damaged or missing"
