"""What a trial leaves on the sweep's storage after each epoch: its model, and what resuming needs.

Ray's own checkpoints are not used: whenever a trial has written two, Ray takes a snapshot of all
trials, which takes longer the more there are. What lies here is found by the trial's name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruners import PrunableViT
from pruners.checkpoint import SHAPE, WEIGHTS
from search.digests import file_digest, json_digest

MODELS = "models"
"""Folder of a sweep's directory that holds a folder for each trial."""

RESULTS, TUNER = "results.json", "tuner.pt"
DECISIVE = ("plan", "origin", "epochs", "seed", "learned", "cost_ratio")
"""What of a configuration decides what comes of a trial."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a trial had come to.

    Attributes:
        results: What it reported, epoch by epoch.
        directory: Its model, as `PrunableViT.save` wrote it.
        tuner: State of its `FineTuner`; None if it has ended.
    """

    results: list[dict[str, Any]]
    directory: Path
    tuner: dict[str, Any] | None


class TrialFiles:
    """The files of one trial."""

    def __init__(self, sweep_directory: Path, config: dict[str, Any]) -> None:
        """Name the files of the trial with this configuration; nothing is read or written."""
        self.directory = sweep_directory / MODELS / config["trial"]
        self.identity = json_digest({key: config.get(key) for key in DECISIVE})

    def save(
        self, vit: PrunableViT, results: list[dict[str, Any]], tuner: dict[str, Any] | None
    ) -> None:
        """Write what a trial has come to; what it had come to before is removed."""
        last = results[-1]
        target = self.directory / model_name(last["epoch"])
        temporary = self.directory / f".{target.name}.{os.uname().nodename}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        vit.save(temporary, measured={"val_top1": last["val_top1"], "epoch": last["epoch"]})
        if tuner is not None:
            torch.save(tuner, temporary / TUNER)
        digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        saved = {"identity": self.identity, "digests": digests, "results": results}
        (temporary / RESULTS).write_text(json.dumps(saved))
        shutil.rmtree(target, ignore_errors=True)  # of another trial of this name
        os.replace(temporary, target)
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
            saved = json.loads(path.read_text())
            if saved["identity"] != self.identity:
                return None
            digests, results = dict(saved["digests"]), list(saved["results"])
            ended = results[-1]["status"] != "running"
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(_damaged(path)) from error
        expected = {WEIGHTS, SHAPE} if ended else {WEIGHTS, SHAPE, TUNER}
        if digests.keys() != expected:
            raise ValueError(_damaged(path))
        for name, digest in digests.items():
            if not (path.parent / name).is_file() or file_digest(path.parent / name) != digest:
                raise ValueError(_damaged(path.parent / name))
        tuner = None
        if not ended:
            tuner = torch.load(path.parent / TUNER, map_location="cpu", weights_only=True)
        return Saved(results=results, directory=path.parent, tuner=tuner)


def model_path(trial: str, epoch: int) -> str:
    """Return where the model of a trial lies after an epoch, below the sweep's directory."""
    return f"{MODELS}/{trial}/{model_name(epoch)}"


def model_name(epoch: int) -> str:
    """Return the name of the folder of an epoch's model; epochs sort by it."""
    return f"epoch-{epoch:04d}"


def _damaged(path: Path) -> str:
    return f"{path} is damaged; move its folder away, and the trial starts again"
