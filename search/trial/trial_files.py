"""Files of a trial on the sweep's storage, after each epoch: its model, and its state to resume.

A trial that has to go in the middle of an epoch leaves the same.

Ray's own checkpoints are not used: whenever a trial has written two, Ray takes a snapshot of all
trials, which takes longer the more there are. What lies here is found by the trial's name.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruners import PrunableViT
from pruners.checkpoint import SHAPE, WEIGHTS
from pruners.model.files import replace_directory
from search.records.atomic import writing_to
from search.records.digests import DAMAGE, file_digest, json_digest, read_sealed, sealed
from search.records.events import EpochResult, TrialConfig
from search.records.trial_record import MODELS, model_name

RESULTS, TUNER, HUNG = "results.json", "tuner.pt", "hung.txt"
DECISIVE = ("plan", "origin", "epochs", "seed", "learned", "cost_ratio")
"""Fields of a configuration that decide a trial's results."""

TunerState = dict[str, Any]
"""What `FineTuner.state_dict` returns, and what belongs to it."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """State of a trial as its last process left it.

    Attributes:
        results: Its results, epoch by epoch.
        directory: Its model, as `PrunableViT.save` wrote it.
        tuner: State of its `FineTuner`, perhaps in the middle of an epoch; None if it has ended.
        seconds: How long it had run.
    """

    results: list[EpochResult]
    directory: Path
    tuner: TunerState | None
    seconds: float


class TrialFiles:
    """The files of one trial."""

    def __init__(self, sweep_directory: Path, config: TrialConfig) -> None:
        """Name the files of the trial with this configuration; nothing is read or written."""
        self.directory = sweep_directory / MODELS / config.trial
        self.digest = json_digest({key: getattr(config, key) for key in DECISIVE})

    def save(
        self,
        vit: PrunableViT,
        results: Sequence[EpochResult],
        tuner: TunerState | None,
        seconds: float,
    ) -> None:
        """Write a trial's state after an epoch, or in the middle of one, in place of the last.

        Raises:
            SweepFailedError: If the directory cannot be written to.
        """
        with writing_to(self.directory):
            last, steps = results[-1], tuner["steps"] if tuner is not None else 0
            target = self.directory / model_name(last.epoch, steps)

            def write(folder: Path) -> None:
                vit.save(folder, measured={"val_top1": last.val_top1, "epoch": last.epoch})
                if tuner is not None:
                    content = io.BytesIO()  # torch.save to a full disk raises no OSError
                    torch.save(tuner, content)
                    (folder / TUNER).write_bytes(content.getvalue())
                digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
                saved = {
                    "identity": self.digest,
                    "digests": digests,
                    "results": [result.to_report() for result in results],
                    "seconds": seconds,
                }
                (folder / RESULTS).write_text(sealed(saved))

            replace_directory(target, write)  # also of another trial of this name
            for other in self.directory.iterdir():
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Saved | None:
        """Return the state that this very trial was left in; None if nothing of it is there.

        Raises:
            ValueError: If a file is not what was written, in one line.
        """
        found = sorted(self.directory.glob("epoch-*"))
        if not found:
            return None
        path = found[-1] / RESULTS
        try:
            saved = read_sealed(path)
            if saved["identity"] != self.digest:
                return None
            digests, seconds = dict(saved["digests"]), float(saved["seconds"])
            results = [_result(values) for values in saved["results"]]
            ended = results[-1].done
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
    """Return the file that says where a trial hung, below the sweep's directory."""
    return f"{MODELS}/{trial}/{HUNG}"


def check_model(directory: Path) -> None:
    """Check a trial's saved model against its digests.

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


def _result(values: Mapping[str, Any]) -> EpochResult:
    return EpochResult.from_json({key: of for key, of in values.items() if key != "done"})


def _tuner_state(path: Path) -> TunerState:
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
