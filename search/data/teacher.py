"""The dense model's logits of the training images, computed once per node and epoch.

All trials of a sweep see the same images in the same epoch (`search.data.augment`), so the dense
model's logits are the same for all of them. The first process of a node that needs an epoch's
writes them to a file, which all processes of the node map into memory; the files of several sweeps
share a folder and a limit.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from pruners import PrunableViT
from pruners.model.files import replace_file
from search.data.augment import Epoch
from search.data.images import Images
from search.records.digests import file_digest, json_digest

Answers = NDArray[np.float16]
"""Logits [rows, classes] of all rows of a source; NaN for images that cannot be read."""

PREFIX = "teacher-"
"""Prefix of the names of these files, in a folder that decoded images lie in too."""


class Teacher:
    """The dense model as teacher of a sweep's trials.

    Attributes:
        dense: The dense model, on the CPU, in eval mode.
        images: The training images.
        augment: Whether training crops and flips them.
        autocast: The type that training computes in (`autocast_dtype`), None for float32.
        device: Where trials train.
        folder: Where the files lie.
        limit_gb: Largest size of all files of the folder, in 1e9 bytes.
        batch_size: Images per batch of the dense model.
    """

    def __init__(
        self,
        dense: PrunableViT,
        images: Images,
        *,
        augment: bool,
        autocast: torch.dtype | None,
        device: torch.device,
        folder: Path,
        limit_gb: float,
        batch_size: int,
    ) -> None:
        """Take over; nothing is computed or read yet."""
        self.dense, self.images, self.augment = dense, images, augment
        self.autocast, self.device = autocast, device
        self.folder, self.limit, self.batch_size = folder, int(limit_gb * 1e9), batch_size
        self._shape = (images.shards.rows, dense.shape().classes)
        self._opened: dict[Path, Answers] = {}

    @cached_property
    def live(self) -> PrunableViT:
        """The dense model on the device, to be asked there."""
        on_cpu = self.device.type == "cpu"
        return self.dense if on_cpu else copy.deepcopy(self.dense).to(self.device)

    def fits(self, epochs: int) -> bool:
        """Whether the answers of so many epochs stay within the limit."""
        rows, classes = self._shape
        files = epochs if self.augment else 1
        return files * rows * classes * np.dtype(np.float16).itemsize <= self.limit

    def answers(self, epoch: Epoch) -> Answers:
        """Return the logits [rows, classes] of all images as they look in an epoch.

        They are computed if no process of this node has done so; meanwhile others wait.

        Raises:
            ValueError: If a logit is not finite in float16.
        """
        path = self.path(epoch)
        if path not in self._opened:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                found = open_answers(path, self._shape)
                if found is None:
                    self._compute(path, epoch)
                    found = open_answers(path, self._shape)
            if found is None:
                raise OSError(f"{path} cannot be read back; give data.cache_dir another folder")
            self._opened[path] = found
            make_room(self.folder, self.limit, keep=path)
        with suppress(FileNotFoundError):  # removed to make room, but still mapped here
            os.utime(path)  # used just now
        return self._opened[path]

    def path(self, epoch: Epoch) -> Path:
        """Return the file of an epoch's answers, named by all that decides them."""
        decisive = {**self._decisive, "views": list(epoch) if self.augment else None}
        return self.folder / f"{PREFIX}{json_digest(decisive)[:40]}.npy"

    @cached_property
    def _decisive(self) -> dict[str, object]:
        return {
            "arch": self.dense.arch,
            "shape": self.dense.shape().to_json(),
            "token_step": self.dense.token_step,
            "weights": weights_digest(self.dense),
            "train": self.images.digest,
            "padding": self.images.padding,
            "autocast": str(self.autocast),
            "device": self.device.type,
        }

    def _compute(self, path: Path, epoch: Epoch) -> None:
        """Write an epoch's answers, and beside them a note of their size and digest."""
        for torn in self.folder.glob(f".{path.name}.*"):  # of a process that died in here
            torn.unlink()
        replace_file(path, lambda temporary: self._write(temporary, epoch))
        note = json.dumps({"bytes": path.stat().st_size, "sha256": file_digest(path)})
        replace_file(path.with_suffix(".json"), lambda temporary: temporary.write_text(note))

    def _write(self, path: Path, epoch: Epoch) -> None:
        (rows, classes), done = self._shape, 0
        views = epoch if self.augment else None
        with path.open("wb") as file:  # a memory map would crash where the disk is full
            file.write(_header(self._shape))
            for images, _, numbers in self.images.numbered(
                self.batch_size, order=None, views=views, device=self.device
            ):
                end = int(numbers[-1]) + 1  # numbers ascend, with gaps where images are corrupt
                part = np.full((end - done, classes), np.nan, dtype=np.float16)
                part[numbers - done] = self._ask(images).cpu().numpy()
                file.write(part.tobytes())
                done = end
            file.write(np.full((rows - done, classes), np.nan, dtype=np.float16).tobytes())

    def _ask(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] in float16, computed in the precision of training."""
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            logits = self.live(images).float().half()
        if not logits.isfinite().all():
            raise ValueError(
                "the dense model's logits are not finite in float16; "
                "give data.teacher_gb = 0 to ask it live, or finetune.distill = 0"
            )
        return logits


def open_answers(path: Path, shape: tuple[int, int]) -> Answers | None:
    """Map a file of answers into memory; None if it is absent or damaged.

    Args:
        path: The file.
        shape: Rows and classes.
    """
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != note["bytes"] or file_digest(path) != note["sha256"]:
            return None
        header = _header(shape)
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return None
        return np.memmap(path, np.float16, "r", offset=len(header), shape=shape)
    # Bad JSON is a ValueError; so is a file that is too short.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _header(shape: tuple[int, int]) -> bytes:
    """Return the head of a NumPy file of float16."""
    stream = io.BytesIO()
    values = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, values)
    return stream.getvalue()


def make_room(folder: Path, limit: int, keep: Path) -> None:
    """Remove the answers that were used least recently until a folder's take `limit` bytes.

    A file whose lock is held stays. One that a process has mapped stays readable there.

    Args:
        folder: The folder.
        limit: In bytes.
        keep: A file that stays.
    """
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for path in folder.glob(f"{PREFIX}*.npy"):
        with suppress(FileNotFoundError):  # another process makes room too
            status = path.stat()
            sizes[path], used[path] = status.st_size, status.st_mtime
    excess = sum(sizes.values()) - limit
    for path in sorted(sizes.keys() - {keep}, key=lambda path: used[path]):
        if excess <= 0:
            return
        lock = path.with_suffix(".lock")
        with suppress(Timeout), FileLock(lock, timeout=0):
            for file in (path, path.with_suffix(".json"), lock):
                file.unlink(missing_ok=True)
            excess -= sizes[path]


def weights_digest(vit: PrunableViT) -> str:
    """SHA-256 of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        values = tensor.cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(memoryview(values.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
