"""Processes that train the same model together, each on its own images of every batch.

Data parallelism without a wrapper around the model: all hold the same weights, average their
gradients, and take the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerOutOfMemoryError(MemoryError):
    """Another process that trains the model ran out of memory, so this one cannot go on."""


class Peers:
    """The processes of `torch.distributed`'s default group, which reduces tensors on the CPU.

    Every method is called by all of them at the same point, or they wait for each other for ever.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        out_of_memory: Says which errors mean that memory was not enough; these, all raise together.
    """

    def __init__(
        self, out_of_memory: Callable[[BaseException], bool], device: torch.device | None = None
    ) -> None:
        """Take part.

        Args:
            out_of_memory: See above.
            device: The model's; None is the CPU. GPUs average gradients among themselves (NCCL).
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.out_of_memory, self._gradients = out_of_memory, dist.group.WORLD
        if device is not None and device.type == "cuda":
            group = dist.new_group(backend="nccl")
            assert isinstance(group, dist.ProcessGroup)
            self._gradients = group

    def any(self, *flags: bool) -> list[bool]:
        """Say of each flag whether any process has it; no one waits for a GPU."""
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.bool().tolist()

    def average(self, tensors: Sequence[Tensor], images: int) -> None:
        """Average tensors in place over the images of all processes.

        Args:
            tensors: Means over this process's images, each [...], on the model's device.
            images: How many these are; at 0 the tensors do not count.
        """
        ones = tensors[0].new_ones(1)
        flat = torch.cat([*(tensor.flatten() for tensor in tensors), ones]) * images
        dist.all_reduce(flat, group=self._gradients)
        means = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def shared(self, value: Any) -> Any:
        """Return what the first process gives, pickled; what others give does not matter."""
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return what each process gives, by rank."""
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held
