"""Heads of a block that lose different numbers of dims, padded to the largest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pruners.model.attention import Attention
from pruners.model.ranking import highest
from pruners.model.shape import BlockShape, ViTShape, units_kept
from pruners.model.sites import RAGGED, ragged_site, unit_sites
from pruners.model.surgery import keep_ragged_dims, padded_size
from pruners.model.types import Scores, Thresholds


@dataclass(frozen=True, kw_only=True)
class RaggedHeads:
    """What the heads of a block keep.

    Attributes:
        index: Number of the block.
        kind: "ragged_dim" or "ragged_v_dim".
        counts: Dims that each head keeps.
        block: The block before the cut.
        qk_too: Whether dims of q and k go with those of v.
    """

    index: int
    kind: str
    counts: list[int]
    block: BlockShape
    qk_too: bool

    @classmethod
    def of(
        cls, units: Collection[str], shape: ViTShape, index: int, thresholds: Thresholds
    ) -> Self | None:
        """Return what thresholds leave of a block's heads; None if they do not cut them so."""
        block = shape.blocks[index]
        for kind in set(units) & set(RAGGED):
            sites = dict(unit_sites(shape, block, index, kind))
            if any(thresholds.get(site, 0.0) > 0.0 for site in sites):
                return cls(
                    index=index,
                    kind=kind,
                    counts=[units_kept(n, thresholds.get(s, 0.0)) for s, n in sites.items()],
                    block=block,
                    qk_too=kind == "ragged_dim" and not shape.qk_norm,
                )
        return None

    def shrink(self, kept: dict[str, int], multiple: int) -> tuple[int, int] | None:
        """Add heads and padded sizes to `kept`; return the rows and columns that are not padding.

        None where nothing is padded.
        """
        alive = [count for count in self.counts if count]
        kept["heads"] = len(alive)
        if not alive:
            return None
        kept["v_dim"] = padded_size(max(alive), self.block.v_dim, multiple)
        if self.qk_too:
            kept["qk_dim"] = kept["v_dim"]
        if min(alive) == kept["v_dim"]:
            return None
        qk_rows = sum(alive) if self.qk_too else len(alive) * self.block.qk_dim
        return 2 * qk_rows + sum(alive), sum(alive)

    def cut(self, attn: Attention, scores: Scores, multiple: int) -> dict[str, Tensor]:
        """Cut dims head by head; return the masks of the padding, [out, in] of each layer."""
        device = attn.qkv.weight.device
        v = torch.zeros(attn.heads, attn.v_dim, dtype=torch.bool, device=device)
        for head, count in enumerate(self.counts):
            own = scores[ragged_site(self.index, head, self.kind)]
            v[head, highest(own, count).to(device)] = True
        qk = v
        if not self.qk_too:
            qk = torch.ones(attn.heads, attn.qk_dim, dtype=torch.bool, device=device)
        return keep_ragged_dims(attn, qk, v, multiple)
