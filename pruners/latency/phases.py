"""From a latency limit to phases: where token selectors stand, and what share each lets through.

Z. Kong et al. (2022), "SPViT", arXiv:2112.13890, latency-aware layer-to-phase training. A
reconstruction: the released code holds nothing of it, and the paper's section was known from memory
only. Pure: what a schedule costs and how accurate it is comes from callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Keeps = Mapping[int, float]
"""Block that a selector stands in front of -> share of all patches that go on from there."""

State = TypeVar("State")
Latency = Callable[[Keeps], float]
"""Keeps -> seconds of the model."""
Tune = Callable[[State, Keeps], tuple[State, float]]
"""A trained state, and the keeps to go on with -> the state trained further, and its accuracy."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the search may do.

    Attributes:
        grid: Keep ratios that are tried, falling; the first is 1.
        tolerance: Points of accuracy that the insertion of one selector may cost.
        merge: Selectors of neighbouring phases whose keep ratios differ by less become one.
    """

    grid: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    tolerance: float = 0.5
    merge: float = 0.085

    def __post_init__(self) -> None:
        """Check the values."""
        falling = all(a > b for a, b in zip(self.grid, self.grid[1:], strict=False))
        if len(self.grid) < 2 or self.grid[0] != 1.0 or not falling or not self.grid[-1] > 0.0:
            raise ValueError(
                f"grid is {list(self.grid)}; give 2 or more ratios, falling from 1 and positive"
            )
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance is {self.tolerance}; give at least 0 points of accuracy")
        if not 0.0 <= self.merge < 1.0:
            raise ValueError(f"merge is {self.merge}; give a difference of shares, 0 <= x < 1")


@dataclass(frozen=True, kw_only=True)
class Schedule(Generic[State]):
    """A schedule that was tried.

    Attributes:
        keeps: Block -> share of all patches that its selector lets through, falling with depth.
        seconds: Latency.
        accuracy: Percent.
        state: What `Tune` returned with it.
    """

    keeps: Keeps
    seconds: float
    accuracy: float
    state: State


def search_phases(
    state: State,
    *,
    depth: int,
    limit: float,
    latency: Latency,
    tune: Tune[State],
    rules: Rules,
) -> Schedule[State]:
    """Insert selectors from the last block towards the input until a latency limit is met.

    The keep ratio of a new selector falls along the grid, down to that of the next one behind it,
    while the accuracy stays within the tolerance of what it was before the insertion. If the limit
    is not met then, ratios fall further where the most latency is gained per accuracy lost. What is
    timed and trained is always what would be returned: merged into phases, without the selectors
    that cost more than they save (`phases_of`). Ratios that save no time are not tried. The dense
    model is tuned first, lest what tuning itself costs be held against the selectors.

    Args:
        state: The dense model, as `tune` takes it.
        depth: Blocks of the model; the first quarter of them gets no selector.
        limit: Seconds.
        latency: Measures keeps; an empty mapping is the dense model.
        tune: Trains a state with given keeps.
        rules: What may be done.

    Raises:
        ValueError: If the limit is out of reach, before anything is trained.
    """
    blocks = selector_blocks(depth)
    least = _least(blocks, latency, rules)
    if not latency(least) <= limit:
        raise ValueError(
            f"limit is {limit:.4g} s; {latency(least):.4g} s is the least within reach, "
            f"the dense model takes {latency({}):.4g} s"
        )
    current = _try(state, {}, latency, tune)
    current = _insert_backwards(current, blocks, limit, latency, tune, rules)
    while current.seconds > limit:
        tried = [
            _try(current.state, keeps, latency, tune)
            for keeps in _moves(current, blocks, latency, rules)
        ]
        # Latency that is not monotone in the tokens can end all moves too early.
        current = max(
            tried or [_try(current.state, least, latency, tune)], key=lambda t: _worth(current, t)
        )
    return current


def selector_blocks(depth: int) -> range:
    """Return the blocks that may have a selector: all but the first quarter, 3 to 11 of 12."""
    return range(max(1, depth // 4), depth)


def phases_of(keeps: Keeps, latency: Latency, rules: Rules) -> dict[int, float]:
    """Merge selectors into phases, and leave out those that cost more than they save.

    A selector whose ratio lies less than `rules.merge` below that of its phase's first selector, or
    above it, joins the phase, which has the first one's ratio.
    """
    merged: dict[int, float] = {}
    ratio = None
    for block, keep in sorted(keeps.items()):
        # The slack keeps 0.9 - 0.8 = 0.09999999999999998 from being less than 0.1.
        if ratio is None or (keep < ratio and ratio - keep >= rules.merge - 1e-9):
            merged[block] = ratio = keep
    seconds = latency(merged)
    for block in sorted(merged, reverse=True):
        without = {b: keep for b, keep in merged.items() if b != block}
        if (faster := latency(without)) <= seconds:
            merged, seconds = without, faster
    return merged


def shares_of(keeps: Keeps) -> dict[int, float]:
    """Return block -> share of the patches that arrive at its selector and do not go on."""
    shares: dict[int, float] = {}
    before = 1.0
    for block, keep in sorted(keeps.items()):
        shares[block] = 1.0 - keep / before
        before = keep
    return shares


def _insert_backwards(
    current: Schedule[State],
    blocks: range,
    limit: float,
    latency: Latency,
    tune: Tune[State],
    rules: Rules,
) -> Schedule[State]:
    frozen: dict[int, float] = {}
    for block in reversed(blocks):
        reference = current.accuracy
        behind = max(frozen.values(), default=rules.grid[-1])  # it must not fall below that
        for ratio in (keep for keep in rules.grid if behind <= keep < 1.0):
            if current.seconds <= limit:
                return current
            keeps = phases_of({**frozen, block: ratio}, latency, rules)
            if latency(keeps) >= current.seconds:
                continue
            tried = _try(current.state, keeps, latency, tune)
            if reference - tried.accuracy > rules.tolerance + 1e-9:
                break
            frozen[block], current = ratio, tried
    return current


def _moves(
    current: Schedule[State], blocks: range, latency: Latency, rules: Rules
) -> Iterator[Keeps]:
    """Yield faster schedules: each phase one step lower, and a new phase in front of all others."""
    for block in current.keeps:
        if (lower := _lowered(current, block, latency, rules)) is not None:
            yield lower
    earliest = min(current.keeps, default=blocks.stop)
    for block in reversed(range(blocks.start, earliest)):
        if (lower := _lowered(current, block, latency, rules)) is not None:
            yield lower
            return


def _lowered(
    current: Schedule[State], block: int, latency: Latency, rules: Rules
) -> dict[int, float] | None:
    """Return the schedule with the next lower ratio of a block that is faster, if there is one."""
    for ratio in (keep for keep in rules.grid if keep < current.keeps.get(block, 1.0)):
        lower = phases_of({**current.keeps, block: ratio}, latency, rules)
        if latency(lower) < current.seconds:
            return lower
    return None


def _least(blocks: range, latency: Latency, rules: Rules) -> dict[int, float]:
    """Return the fastest schedule: one selector at the lowest ratio, or none."""
    single: list[dict[int, float]] = [{block: rules.grid[-1]} for block in blocks]
    return min([*single, {}], key=latency)


def _try(state: State, keeps: Keeps, latency: Latency, tune: Tune[State]) -> Schedule[State]:
    state, accuracy = tune(state, keeps)
    return Schedule(keeps=keeps, seconds=latency(keeps), accuracy=accuracy, state=state)


def _worth(current: Schedule[State], tried: Schedule[State]) -> tuple[float, float]:
    """Rank a move: seconds gained per point lost, and the gain among those that lose nothing."""
    gain, loss = current.seconds - tried.seconds, current.accuracy - tried.accuracy
    return (gain / loss, gain) if loss > 0.0 else (float("inf"), gain)
