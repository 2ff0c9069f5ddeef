"""CAIT-style asymmetric token merging: neighbours merge, and the patches stay a grid.

Wang, Chen, Lin, Zhao, Han, Ding (2023), "CAIT", arXiv:2309.15755. A reconstruction: that
neighbouring tokens are merged, first horizontally and in a later block vertically, so that the
spatial structure stays, is the paper's; the merge operators, the schedule and merging only some of
the columns are ours. The channels of CAIT are `cait_channels`: a CAIT trial has both steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.families.allocation import out_of_reach
from pruners.families.token import TokenPruner, token_shares
from pruners.model.cost import cost_of
from pruners.model.shape import ViTShape
from pruners.model.tokens import FrontReducer, TokenReducer, Tokens
from pruners.model.types import Scores, Thresholds
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class CaitTokens(TokenPruner):
    """Merges pairs of neighbouring columns, then of rows, then of columns again, and so on.

    A threshold is the share of the columns (or rows) that goes in front of that block, at most one
    half: then all columns are merged in pairs, as in the paper. With less, the pairs lie evenly
    over the grid; what has no partner passes.

    Attributes:
        merge: "linear" is a linear layer on the pair, the mean at first; "mean" is the mean, which
            needs no training; "weighted" weights the two by how well each agrees with its
            neighbourhood.
    """

    merge: Literal["linear", "mean", "weighted"] = "linear"

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return a site in front of each block, and the number of patches."""
        return {f"blocks.{i}.token": shape.patches for i in range(len(shape.blocks))}

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return block -> module that merges in front of it."""
        grid = list(shape.grid)
        reducers: dict[int, TokenReducer] = {}
        axis = 1
        for index, share in token_shares(thresholds).items():
            if grid[axis] == 1:
                axis = 1 - axis
            merged = min(int(share * grid[axis] + 0.5), grid[axis] // 2)
            if merged:
                reducers[index] = MergeNeighbours(
                    shape, (grid[0], grid[1]), axis, merged, self.merge
                )
                grid[axis] -= merged
                axis = 1 - axis
        return reducers

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Halve the grid between blocks in two places, as late as the budget allows.

        Where one place is enough it is one; where two are too few, more stand at the first blocks.
        """
        blocks = range(1, len(shape.blocks))
        least = shape
        for count in range(2, len(blocks) + 1):
            fitting: list[tuple[int, dict[str, float]]] = []
            for places in _places(blocks, count):
                shares = {f"blocks.{i}.token": 0.5 if i in places else 0.0 for i in blocks}
                least = self.shrink(shape, shares)
                if (cost := cost_of(least).effective_macs) <= macs:
                    fitting.append((cost, shares))
            if fitting:
                return max(fitting, key=lambda each: each[0])[1]
        raise out_of_reach(macs, least)


def _places(blocks: range, count: int) -> Iterator[tuple[int, ...]]:
    """Yield `count` blocks, the last two anywhere, the others first; for two also one alone."""
    if count == 2:
        yield from itertools.combinations(blocks, 1)
    first = tuple(blocks[: count - 2])
    for pair in itertools.combinations(blocks[count - 2 :], 2):
        yield (*first, *pair)


class MergeNeighbours(FrontReducer):
    """Merges some disjoint pairs of neighbouring columns or rows of a grid of patches.

    Attributes:
        grid: Rows and columns that arrive.
        axis: 0 merges rows, 1 merges columns.
        firsts: [M], the first row or column of each pair; the second is the next one.
        passing: [L - 2M], the rows or columns that have no partner.
        order: [L - M], which of [merged pairs, those that pass] comes first, second, ...
        owner: [L], where in the merged grid each row or column is found.
        mix: The linear layer on a pair, 2D -> D, of the merge "linear".
    """

    firsts: Tensor
    passing: Tensor
    order: Tensor
    owner: Tensor

    def __init__(
        self, shape: ViTShape, grid: tuple[int, int], axis: int, merged: int, merge: str
    ) -> None:
        """Merge `merged` pairs along an axis."""
        super().__init__()
        self.grid, self.axis, self.merged, self.merge = grid, axis, merged, merge
        self.prefix_tokens, self.dim = shape.prefix_tokens, shape.dim
        length = grid[axis]
        slots = length // 2
        firsts = [2 * ((2 * pair + 1) * slots // (2 * merged)) for pair in range(merged)]
        seconds = {first + 1 for first in firsts}
        starts = [i for i in range(length) if i not in seconds]  # of what is left, in order
        passing = [i for i in starts if i not in firsts]
        found = [*firsts, *passing]
        left = {start: place for place, start in enumerate(starts)}
        owner = [left[i - 1 if i in seconds else i] for i in range(length)]
        for name, values in (
            ("firsts", firsts),
            ("passing", passing),
            ("order", [found.index(start) for start in starts]),
            ("owner", owner),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)
        self.mix: nn.Linear | None = None
        if merge == "linear":
            self.mix = nn.Linear(2 * self.dim, self.dim)
            with torch.no_grad():
                half = 0.5 * torch.eye(self.dim)
                self.mix.weight.copy_(torch.cat([half, half], dim=1))
                self.mix.bias.zero_()

    def tokens_after(self, tokens: int) -> int:
        """Prefix, and the smaller grid."""
        return self.prefix_tokens + self.grid[1 - self.axis] * (self.grid[self.axis] - self.merged)

    def macs(self, tokens: int) -> int:
        """Count the linear layer, or the agreement of each token with its neighbourhood."""
        pairs = self.merged * self.grid[1 - self.axis]
        if self.merge == "linear":
            return pairs * 2 * self.dim * self.dim
        return 2 * pairs * self.dim if self.merge == "weighted" else 0

    def forward(self, tokens: Tokens) -> Tokens:
        """Merge; the prefix tokens pass.

        Raises:
            ValueError: If the tokens are not the grid this was made for.
        """
        rows, columns = self.grid
        prefix, patches = tokens.x[:, : self.prefix_tokens], tokens.x[:, self.prefix_tokens :]
        if patches.shape[1] != rows * columns:
            raise ValueError(
                f"cait_tokens got {patches.shape[1]} patches; give images of {rows} x {columns}"
            )
        x = patches.unflatten(1, (rows, columns))  # [B, H, W, D]
        first = x.index_select(1 + self.axis, self.firsts)
        second = x.index_select(1 + self.axis, self.firsts + 1)
        if self.mix is not None:
            merged = self.mix(torch.cat([first, second], dim=-1))
        elif self.merge == "mean":
            merged = 0.5 * (first + second)
        else:
            share = self._first_share(x).unsqueeze(-1).to(x.dtype)
            merged = share * first + (1.0 - share) * second
        passing = x.index_select(1 + self.axis, self.passing)
        both = torch.cat([merged.to(x.dtype), passing], dim=1 + self.axis)
        x = both.index_select(1 + self.axis, self.order)
        return tokens._replace(x=torch.cat([prefix, x.flatten(1, 2)], dim=1))

    def expand(self, x: Tensor) -> Tensor:
        """Undo the merge by repetition: [B, D, H', W'] -> [B, D, H, W]."""
        return x.index_select(2 + self.axis, self.owner)

    def _first_share(self, x: Tensor) -> Tensor:
        """Weight of the first of each pair: softmax of the cosines with the 3x3 neighbourhoods."""
        grid = x.permute(0, 3, 1, 2).float()
        near = F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
        agreement = F.cosine_similarity(grid, near, dim=1)  # [B, H, W]
        first = agreement.index_select(1 + self.axis, self.firsts)
        second = agreement.index_select(1 + self.axis, self.firsts + 1)
        return torch.sigmoid(first - second)


def feature_map(vit: ViT, images: Tensor) -> Tensor:
    """Return the final patch tokens as a map [B, D, H, W] of the full grid, for dense tasks.

    Merged tokens are repeated wherever the patches were that they stand for. `vit` is a model cut
    by `cait_tokens`, or one with all its tokens.
    """
    shape = vit.shape()
    merges = [block.front for block in vit.blocks if isinstance(block.front, MergeNeighbours)]
    grid = list(shape.grid)
    for merge in merges:
        grid[merge.axis] -= merge.merged
    patches = vit.tokens(images).x[:, shape.prefix_tokens :]
    x = patches.transpose(1, 2).unflatten(2, (grid[0], grid[1]))
    for merge in reversed(merges):
        x = merge.expand(x)
    return x
