"""What workers begin with where a fault, or a device, is not to be had from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from search.records.events import TrialConfig
    from search.sweep.spec import Sweep


class AfterImport:
    """Changes a module when it has been imported: Ray's idle workers need not import torch."""

    def __init__(self, name: str, change: Callable[[], None]) -> None:
        self.name, self.change = name, change
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the module: as others would, and then the change."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def short_of_memory() -> None:
    """Let PyTorch's own allocator fail in the second epoch of trials that pass whole batches."""
    AfterImport("pruners.training.fine_tune", _limit_memory)


def _limit_memory() -> None:
    import torch

    from pruners.training.fine_tune import FineTuner

    backward = FineTuner._backward

    def limited(tuner: FineTuner, images: torch.Tensor, *others: object) -> torch.Tensor:
        if tuner.parts < 4 and tuner.schedule.last_epoch >= 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return backward(tuner, images, *others)

    FineTuner._backward = limited  # type: ignore[method-assign]


def fill_the_node() -> None:
    """Let a trial take all memory in its second epoch, once: until Ray ends its process."""
    AfterImport("pruners.training.fine_tune", _fill)


def _fill() -> None:
    import numpy as np

    from pruners.training.fine_tune import FineTuner

    backward, filled = FineTuner._backward, Path(os.environ["GPU_NOTES"]) / "filled"

    def hungry(tuner: FineTuner, *others: Any) -> torch.Tensor:
        if tuner.schedule.last_epoch >= 3 and not filled.exists():
            filled.touch()
            taken: list[object] = []
            while len(taken) < 64:  # as much as 16 GB
                taken.append(np.ones(1 << 28, np.uint8))
                time.sleep(0.02)  # Ray looks now and then
            time.sleep(30)
        return backward(tuner, *others)

    FineTuner._backward = hungry  # type: ignore[method-assign]


def cpu_for_gpu() -> None:
    """Let trials that get a GPU which exists for Ray alone run on the CPU.

    Which one they got is written down in the folder that GPU_NOTES names.
    """
    AfterImport("search.data.splits", _let_cpus_do)


def _let_cpus_do() -> None:
    import ray
    import torch

    from search.data import splits

    def device(sweep: object) -> torch.device:
        node = ray.get_runtime_context().get_node_id()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        note = Path(os.environ["GPU_NOTES"]) / f"{os.getpid()}.txt"
        note.write_text(f"{node} {seen}")
        return torch.device("cpu")

    splits.trial_device = device  # type: ignore[assignment]


def watched() -> None:
    """Do the same, with a cache folder for each logical node, and write down what workers do.

    Lines of JSON, a file per process: which GPUs it sees, what it decodes, which learned scores it
    reads, and how large the configurations of its trials are.
    """
    AfterImport("search.data.splits", _watch)
    AfterImport("search.trial.training", _watch_training)


def _note(what: str, **values: object) -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    line = {"what": what, "node": node, "process": os.getpid(), "time": time.time(), **values}
    with (Path(os.environ["GPU_NOTES"]) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _meet() -> None:
    """Wait for another process that trains: how fast Ray starts one does not matter then."""
    notes, deadline = Path(os.environ["GPU_NOTES"]), time.monotonic() + 60
    while sum('"what": "trial"' in p.read_text() for p in notes.glob("*.jsonl")) < 2:
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _watch_training() -> None:
    from search.trial.training import Training

    train = Training.__init__

    def training(one: Training, context: Any, config: TrialConfig, *others: Any) -> None:
        _note("trial", learned=config.learned, bytes=len(json.dumps(config.to_json())))
        if "MEET" in os.environ:
            _meet()
        train(one, context, config, *others)

    Training.__init__ = training  # type: ignore[method-assign]


def _watch() -> None:
    _let_cpus_do()
    import ray

    from pruners.families.learned import Learned
    from search.data import images, splits

    notes = Path(os.environ["GPU_NOTES"])
    device_of, decode_to, load = splits.trial_device, images.write_decoded, Learned.load

    def device(sweep: Sweep) -> torch.device:
        context = ray.get_runtime_context()
        os.environ["XDG_CACHE_HOME"] = str(notes / context.get_node_id())
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        is_actor = context.get_actor_id() is not None
        _note("device", gpus=seen, is_actor=is_actor)
        return device_of(sweep)

    def decode(path: Path, *others: Any) -> None:
        _note("decode", file=path.name)
        decode_to(path, *others)

    def loaded(path: Path) -> Learned:
        _note("scores", path=str(path))
        return load(path)

    splits.trial_device = device
    images.write_decoded = decode
    Learned.load = loaded  # type: ignore[method-assign, assignment]
