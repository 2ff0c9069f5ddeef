"""How long a model takes on the device at hand, block by block and token count by token count.

The latency-sparsity table of Z. Kong et al. (2022), "SPViT", arXiv:2112.13890.
"""

from __future__ import annotations

import dataclasses
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pruners.latency.timing import seconds_in_turn
from pruners.model.shape import BlockShape, ViTShape
from pruners.model.tokens import FrontReducer, Tokens
from pruners.model.vit import ViT, eval_mode


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Seconds per image of a model's parts, at some numbers of tokens.

    Blocks of a unit-pruned model differ, so each kind of block has a row of its own.

    Attributes:
        counts: Numbers of tokens that were measured, prefix tokens included, rising.
        blocks_s: For each kind of block its seconds at these counts.
        kinds: For each block of the model its row in `blocks_s`.
        selector_s: Seconds of a token selector that these numbers of tokens enter.
        outer_s: Seconds of the embedding, the last norm and the classifier.
        batch: Images per batch, all of which a measured time is divided by.
        device: What it was measured on.
    """

    counts: tuple[int, ...]
    blocks_s: tuple[tuple[float, ...], ...]
    kinds: tuple[int, ...]
    selector_s: tuple[float, ...]
    outer_s: float
    batch: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check that the rows fit."""
        rising = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if not self.counts or not rising:
            raise ValueError(f"counts is {list(self.counts)}; give rising numbers of tokens")
        for row in (*self.blocks_s, self.selector_s):
            if len(row) != len(self.counts):
                raise ValueError(
                    f"a row of seconds has {len(row)} values; give {len(self.counts)}, "
                    "one per count"
                )
        if any(kind not in range(len(self.blocks_s)) for kind in self.kinds):
            raise ValueError(
                f"kinds is {list(self.kinds)}; give rows of blocks_s, 0 to {len(self.blocks_s) - 1}"
            )

    def latency(self, tokens: Sequence[int], selected: Sequence[int] = ()) -> float:
        """Return the seconds per image: T_outer + sum of T_block(N_l) + sum of T_selector(N).

        Args:
            tokens: Tokens that enter the attention of each block.
            selected: Tokens that enter each selector.

        Raises:
            ValueError: If the blocks are not as many as the model's, or for a count outside what
                was measured; between two counts the seconds are interpolated linearly.
        """
        if len(tokens) != len(self.kinds):
            raise ValueError(
                f"tokens has {len(tokens)} values; give {len(self.kinds)}, one per block"
            )
        blocks = (
            self._at(self.blocks_s[kind], count)
            for kind, count in zip(self.kinds, tokens, strict=True)
        )
        return self.outer_s + sum(blocks) + sum(self._at(self.selector_s, n) for n in selected)

    def latency_of(self, shape: ViTShape) -> float:
        """Return the seconds per image of a shape whose tokens are reduced in front of blocks."""
        entering = [shape.patches + shape.prefix_tokens, *(b.mlp_tokens for b in shape.blocks)]
        selected = [n for n, b in zip(entering, shape.blocks, strict=False) if b.reducer_params]
        return self.latency([block.tokens for block in shape.blocks], selected)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If a field is missing or unknown, or if rows do not fit.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if known != set(values):
            raise ValueError(
                f"latency table has missing fields {sorted(known - set(values))} and unknown "
                f"fields {sorted(set(values) - known)}; give what LatencyTable.to_json writes"
            )
        rows = {key: tuple(values[key]) for key in ("counts", "kinds", "selector_s")}
        blocks = tuple(tuple(row) for row in values["blocks_s"])
        return cls(**{**values, **rows, "blocks_s": blocks})

    def _at(self, seconds: Sequence[float], count: int) -> float:
        low, high = self.counts[0], self.counts[-1]
        if not low <= count <= high:
            raise ValueError(f"token count {count} was not measured; give {low} to {high}")
        right = bisect_left(self.counts, count)
        if self.counts[right] == count:
            return seconds[right]
        left = right - 1
        way = (count - self.counts[left]) / (self.counts[right] - self.counts[left])
        return seconds[left] + way * (seconds[right] - seconds[left])


@torch.inference_mode()
def measure_latency(
    vit: ViT,
    selector: FrontReducer,
    counts: Sequence[int],
    *,
    batch: int = 1,
    rounds: int = 20,
    warmup: int = 3,
) -> LatencyTable:
    """Measure a model whose tokens are not reduced, on the device that it is on.

    Attention runs as it is set, fused or not. Every round times everything once, so that a busy
    moment of the machine does not hit one count alone; the medians of the rounds count.

    Args:
        vit: The model; one block of each kind is measured.
        selector: A selector that takes all these numbers of tokens; moved to the model's device.
        counts: Numbers of tokens, prefix tokens included.
        batch: Images per batch.
        rounds: Timed runs of each part.
        warmup: Runs of each part before these.

    Raises:
        ValueError: If the tokens of the model are reduced, or if there is nothing to measure.
    """
    shape, device = vit.shape(), next(vit.parameters()).device
    if shape.reduced:
        raise ValueError("vit has reduced tokens; measure the model before they are reduced")
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds is {rounds} and batch is {batch}; give at least 1 of each")
    counts = sorted(set(counts))
    if not counts or counts[0] < 1:
        raise ValueError(f"counts is {counts}; give numbers of tokens, 1 or more")
    kinds, examples = _kinds(shape)
    selector = selector.to(device).eval()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    streams = [draw(batch, count, shape.dim).to(device) for count in counts]
    images = draw(batch, shape.channels, *shape.image).to(device)
    parts: list[Callable[[], object]] = [lambda: vit.classify(_outer(vit, images))]
    for front in (selector, *(vit.blocks[index] for index in examples)):
        parts += [_call(front, Tokens(x)) for x in streams]
    with eval_mode(vit):
        times = seconds_in_turn(parts, rounds=rounds, warmup=warmup, device=device)
    seconds = [statistics.median(taken) / batch for taken in times]
    rows = [tuple(seconds[i : i + len(counts)]) for i in range(1, len(seconds), len(counts))]
    return LatencyTable(
        counts=tuple(counts),
        blocks_s=tuple(rows[1:]),
        kinds=kinds,
        selector_s=rows[0],
        outer_s=seconds[0],
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _kinds(shape: ViTShape) -> tuple[tuple[int, ...], list[int]]:
    """Return each block's kind, and for each kind the first block of it."""
    firsts: dict[BlockShape, int] = {}
    for index, block in enumerate(shape.blocks):
        firsts.setdefault(block, index)
    numbers = {block: number for number, block in enumerate(firsts)}
    return tuple(numbers[block] for block in shape.blocks), list(firsts.values())


def _outer(vit: ViT, images: torch.Tensor) -> Tokens:
    return Tokens(vit.vit.norm(vit.embed(images)))


def _call(module: torch.nn.Module, tokens: Tokens) -> Callable[[], object]:
    return lambda: module(tokens)
