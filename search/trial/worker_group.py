"""A trial that several processes train together: a worker group of Ray Train.

The group lives as long as the trial's actor, from trial to trial. When a worker dies the trial
fails as a whole, and is resumed from what was saved. A worker that has to go says so to all
after a step; one that hangs lets the first one hang too, whose process is then ended.
"""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError

from search.records.events import TrialConfig
from search.sweep.spec import Sweep
from search.trial.inputs import TrialInputs
from search.trial.worker import END, STEP, Answer, Order, work

HEAD = {"node:__internal_head__": 0.001}
"""What the trial's own actor takes: a place on the head, which is not preempted, but no CPU."""

FOLDER = "groups"
"""Folder of Ray Train's own state, below that of Ray Tune."""

TIMEOUT_S = 14 * 24 * 3600
"""How long a worker waits for another: without end, as `max_epoch_hours` and Ray end what hangs."""

LOOK_S = 1.0
"""How often it is looked whether the group lives still."""

FOLLOWS = re.compile(r"Connection \w+ by peer")
"""What workers say that wait for one that has died."""

END_S = 15.0
"""How long a group may take to end by itself."""


def worker_bundle(sweep: Sweep) -> dict[str, float]:
    """Resources of one worker, as Ray counts them."""
    resources = {"CPU": sweep.resources.cpu, "GPU": sweep.resources.gpu}
    return {key: amount for key, amount in resources.items() if amount}


class SharedTrial(tune.Trainable):
    """An actor of Ray Tune whose trials a worker group runs, step by step."""

    failure: Exception | None = None

    def setup(self, config: dict[str, Any], inputs: TrialInputs | None = None) -> None:
        """Start the group, which waits until there is room for all of its workers."""
        if inputs is None:
            raise ValueError("inputs is None; give TrialInputs through tune.with_parameters")
        self.order: Order = TrialConfig.from_json(config)
        self.desk = ray.remote(num_cpus=0)(Desk).remote()
        trainer = _trainer(inputs, {"inputs": ray.put(inputs), "desk": self.desk})
        self.thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self.thread.start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let the next trial run in the same group."""
        self.order = TrialConfig.from_json(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Let the group run an epoch and return its metrics.

        Raises:
            ToldToEndError: If one of its processes is to end; the trial's state is saved.
            SweepFailedError: If the sweep cannot go on.
            RuntimeError: If the group has failed.
        """
        self.desk.order.remote(self.order)
        self.order = STEP
        coming = self.desk.next_answer.remote()
        while not ray.wait([coming], timeout=LOOK_S)[0]:
            if not self.thread.is_alive():
                raise RuntimeError(_reason(self.failure)) from self.failure
        answer: Answer = ray.get(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer.to_report()

    def cleanup(self) -> None:
        """Let the group end, so that its GPUs are free; Ray ends what does not, with this actor."""
        self.desk.order.remote(END)
        self.thread.join(END_S)

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:  # `step` raises it, in the trial's own thread
            self.failure = error


class Desk:
    """An actor where a trial's own actor and the first worker of its group meet."""

    def __init__(self) -> None:
        """Nothing lies there yet."""
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()

    async def order(self, order: Order) -> None:
        """Ask for a step, or for the end."""
        await self._orders.put(order)

    async def next_order(self) -> Order:
        """Wait for the next order."""
        return await self._orders.get()

    async def answer(self, answer: Answer) -> None:
        """Give the result of a step."""
        await self._answers.put(answer)

    async def next_answer(self) -> Answer:
        """Wait for the next answer."""
        return await self._answers.get()


class _OneGpuEach(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's set-up of PyTorch, without letting all workers of a node see all their GPUs."""

    share_cuda_visible_devices = False


@dataclass
class OneGpuEach(TorchConfig):
    """A process group on the CPU, of workers that see one GPU each."""

    backend: str | None = "gloo"
    timeout_s: int = TIMEOUT_S

    @property
    def backend_cls(self) -> type:
        """Class that sets it up."""
        return _OneGpuEach


def _trainer(inputs: TrialInputs, given: dict[str, Any]) -> TorchTrainer:
    sweep = inputs.sweep
    scaling = ScalingConfig(
        num_workers=sweep.resources.workers,
        use_gpu=sweep.resources.gpu > 0,
        resources_per_worker=worker_bundle(sweep),
    )
    # A trial that fails is Tune's to restart.
    failures = FailureConfig(max_failures=0, max_preemption_failures=0)
    folder: Path = inputs.directory / ray_folder(sweep) / FOLDER
    run = RunConfig(name=uuid.uuid4().hex, storage_path=str(folder), failure_config=failures)
    return TorchTrainer(
        work,
        train_loop_config=given,
        torch_config=OneGpuEach(),
        scaling_config=scaling,
        run_config=run,
    )


def ray_folder(sweep: Sweep) -> str:
    """Return the folder of a sweep's directory that Ray keeps its state in.

    It bears the sweep's name: Ray prepares what it writes there in a folder of that name, which
    two sweeps that start in the same second would share.
    """
    return f"ray-{sweep.name}"


def _reason(failure: Exception | None) -> str:
    """Say in a line why a group has failed."""
    if isinstance(failure, PreemptionError):
        return "a worker's node was preempted"
    failures: dict[int, Exception] = getattr(failure, "worker_failures", {})
    lines = [f"worker {rank}: {_last_line(error)}" for rank, error in sorted(failures.items())]
    causes = [line for line in lines if not FOLLOWS.search(line)] or lines
    return "; ".join(causes) or f"its worker group ended: {_last_line(failure)}"


def _last_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
