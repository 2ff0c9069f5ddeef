"""What workers begin with where a fault, or a device, is not to be had from outside."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def short_of_memory() -> None:
    """Let PyTorch's own allocator fail in the second epoch of trials that pass whole batches."""
    from pruners.training import FineTuner

    loss_of = FineTuner._loss_of

    def limited(tuner: FineTuner, images: torch.Tensor, *others: object) -> torch.Tensor:
        if tuner.parts < 4 and tuner.schedule.last_epoch >= 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return loss_of(tuner, images, *others)

    FineTuner._loss_of = limited  # type: ignore[method-assign]


def cpu_for_gpu() -> None:
    """Let trials that get a GPU which exists for Ray alone run on the CPU.

    Which one they got is written down in the folder that GPU_NOTES names.
    """
    import ray

    from search import trial_data

    def device(sweep: object) -> torch.device:
        node = ray.get_runtime_context().get_node_id()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        note = Path(os.environ["GPU_NOTES"]) / f"{os.getpid()}.txt"
        note.write_text(f"{node} {seen}")
        return torch.device("cpu")

    trial_data.trial_device = device  # type: ignore[assignment]
