"""PiToMe: protect informative tokens before merging (Tran et al., 2024, arXiv:2405.16148).

Re-implemented from the paper and its code; no parameters, no training needed. The energy is the
code's ELU(cos - margin), which is continuous at the margin (the paper's is cos above it).
Departures: how many patches are merged in a block is the plan's (the paper keeps one ratio in all
blocks); the prefix tokens take no part, and stay in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruners.families.merging import MergingPruner, MergingReducer
from pruners.families.options import option
from pruners.model.attention import Attended
from pruners.model.merging import Merges, token_sizes, unit_vectors
from pruners.model.shape import ViTShape
from pruners.model.tokens import Tokens, split_by_score, take_tokens


@dataclass(frozen=True, kw_only=True)
class PiToMe(MergingPruner):
    """Merges patches that many others resemble, and protects those that stand alone.

    A patch's energy is the mean over all patches of ELU(cosine of the keys - margin). To merge M
    patches, the 2M of the highest energy are split in turn by their order into A and B, and each of
    A goes into the most similar one of B. Sizes and later attention are as in `tome`.

    Attributes:
        margin: Cosine above which patches count as alike, in the first block; it falls linearly to
            0 behind the last one.
    """

    margin: float = option(0.9, low=-1.0, high=1.0)

    def reducer(self, shape: ViTShape, index: int, merged: int) -> MergingReducer:
        """Return a module that merges `merged` patches behind the attention of block `index`."""
        margin = self.margin * (1.0 - index / len(shape.blocks))
        return MergeRedundant(shape.prefix_tokens, shape.blocks[index].qk_dim, merged, margin)


class MergeRedundant(MergingReducer):
    """Merges a number of patches of high energy."""

    def __init__(self, prefix_tokens: int, qk_dim: int, merged: int, margin: float) -> None:
        """Merge `merged` patches, at most half of those that arrive."""
        super().__init__(prefix_tokens, merged)
        self.qk_dim, self.margin = qk_dim, margin

    def macs(self, tokens: int) -> int:
        """Count the similarities of all patches with all patches."""
        return (tokens - self.prefix_tokens) ** 2 * self.qk_dim

    def forward(self, tokens: Tokens, attended: Attended, scale: float) -> Tokens:
        """Merge; the prefix tokens are first, then the protected patches, then B."""
        keys = attended.key.mean(dim=1)[:, self.prefix_tokens :]
        merges = ordered_match(keys, self.merged, self.margin, self.prefix_tokens)
        x, size = merges.merge(tokens.x, token_sizes(tokens.x, tokens.size))
        return tokens._replace(x=x, size=size)


def energy(cosines: Tensor, margin: float) -> Tensor:
    """Return the energy of each patch, [B, P]: how many others it resembles.

    Tran et al. (2024), equation 4, as in the authors' code: the mean over j of ELU(cos_ij - m).

    Args:
        cosines: [B, P, P].
        margin: m.
    """
    return F.elu(cosines - margin).mean(dim=-1)


@torch.no_grad()
def ordered_match(keys: Tensor, merged: int, margin: float, prefix: int) -> Merges:
    """Find the patches to merge by bipartite matching in the order of their energies.

    The matching of the authors' code: alternate patches of that order are A and B, and all of A go.

    Args:
        keys: [B, P, K] of the patches, averaged over heads.
        merged: M, how many patches are merged, at most P // 2.
        margin: See `energy`.
        prefix: How many prefix tokens stand in front of the patches.
    """
    keys = unit_vectors(keys)
    cosines = keys @ keys.transpose(1, 2)
    mergeable, protected = split_by_score(energy(cosines, margin), 2 * merged)
    a, b = mergeable[:, ::2], mergeable[:, 1::2]  # [B, M]
    between = take_tokens(cosines, a).gather(2, b.unsqueeze(1).expand(-1, merged, -1))
    front = torch.arange(prefix, device=keys.device).expand(keys.shape[0], -1)
    return Merges(
        kept=torch.cat([front, prefix + protected, prefix + b], dim=1),
        gone=prefix + a,
        into=prefix + protected.shape[1] + between.argmax(dim=-1),
    )
