"""Relaxed structure: how many groups of columns go, as numbers, and blocks that may be skipped.

What primal-dual methods move (S. Yu et al., 2022, arXiv:2203.08243): which groups go follows from
their norms, how many from a fraction with a multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruners.model.gates import hard, linear_macs
from pruners.model.shape import ViTShape
from pruners.model.tokens import Tokens
from pruners.model.vit import Block


class Groups(nn.Module):
    """How many groups go from a set of them, relaxed: s or r, with its multiplier y or p.

    Attributes:
        fraction: [...], share that goes, 0 to (units - 1) / units; ceil(fraction * units) go.
        dual: [...], multiplier of A = 0.
        rank: [..., units], place of each group's norm in its set; 0 goes first.
    """

    dual: Tensor
    rank: Tensor

    def __init__(self, norms: Tensor) -> None:
        """Keep everything. `norms` is [..., units]."""
        super().__init__()
        self.units = norms.shape[-1]
        self.fraction = nn.Parameter(torch.zeros_like(norms[..., 0]))
        self.register_buffer("dual", torch.full_like(norms[..., 0], 1e-3))
        self.register_buffer("rank", torch.zeros_like(norms, dtype=torch.long))
        self.rerank(norms)

    def rerank(self, norms: Tensor) -> None:
        """Take over the order of norms [..., units]."""
        self.rank.copy_(norms.argsort(dim=-1, stable=True).argsort(dim=-1))

    def places(self) -> Tensor:
        """Return rank - ceil(fraction * units), [..., units]: negative where a group goes."""
        removed = torch.ceil(self.fraction.detach() * self.units - 1e-3)  # of rounding errors
        return self.rank - removed.unsqueeze(-1)

    def kept(self) -> Tensor:
        """Return 0 or 1 for each group, [..., units].

        The ceil is straight-through. One more removal takes the group that is next in rank, so its
        gate has the slope -units to the fraction, and the others have none.
        """
        places = self.places()
        return hard(-self.fraction.unsqueeze(-1) * self.units * (places == 0), places >= 0)

    def factors(self, step: float) -> Tensor:
        """Return what the proximal map of step * dual * |group|^2 multiplies by, [..., units].

        The step is that of the scaled A, so the layer's norm is in it.
        """
        shrunk = 1.0 / (1.0 + 2.0 * step * self.dual.unsqueeze(-1))
        return torch.where(self.places() < 0, shrunk, 1.0)


class CompressedBlock(nn.Module):
    """A block that may be skipped, and the groups of its columns.

    Attributes:
        gate: g1, which mixes the block (1) with the identity (0); None runs the block alone.
        skipped: Whether the block does not run.
        groups: "heads" [H], "dims" [H, V] and "neurons" [F], as far as the branches exist.
    """

    def __init__(self, block: Block) -> None:
        """Take a block's place."""
        super().__init__()
        self.block = block
        self.gate: Tensor | None = None
        self.skipped = False
        self.groups = {name: Groups(norms) for name, norms in self.norms().items()}
        self._registered = nn.ModuleList(self.groups.values())

    def forward(self, x: Tensor) -> Tensor:
        """Return g1 * block(x) + (1 - g1) * x."""
        if self.skipped:
            return x
        out = self.block(Tokens(x)).x
        return out if self.gate is None else x + self.gate * (out - x)

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Return the squared norms of the columns of proj and fc2, by group."""
        norms: dict[str, Tensor] = {}
        if (attn := self.block.attn) is not None:
            columns = attn.proj.weight.square().sum(dim=0).view(attn.heads, attn.v_dim)
            norms |= {"heads": columns.sum(dim=1), "dims": columns}
        if (mlp := self.block.mlp) is not None:
            norms["neurons"] = mlp.fc2.weight.square().sum(dim=0)
        return norms

    def removed_norms(self) -> dict[str, Tensor]:
        """Return A of each group, as a share of its layer's norm."""
        norms = self.norms()
        return {
            name: ((1.0 - group.kept()) * norms[name]).sum(dim=-1) / norms[name].sum()
            for name, group in self.groups.items()
        }

    @torch.no_grad()
    def shrink(self, step: float) -> None:
        """Shrink the columns of what goes, and rank anew."""
        groups = self.groups
        if self.block.attn is not None:
            factors = groups["heads"].factors(step).unsqueeze(1) * groups["dims"].factors(step)
            self.block.attn.proj.weight *= factors.flatten()
        if self.block.mlp is not None:
            self.block.mlp.fc2.weight *= groups["neurons"].factors(step)
        for name, norms in self.norms().items():
            groups[name].rerank(norms)

    def masks(self) -> dict[str, Tensor]:
        """Return slot -> 0 or 1 for each of its units: "mixed" [H, V] and "neuron" [F]."""
        masks, kept = {}, {name: group.kept() for name, group in self.groups.items()}
        if "heads" in kept:
            masks["mixed"] = kept["heads"].unsqueeze(1) * kept["dims"]
        if "neurons" in kept:
            masks["neuron"] = kept["neurons"]
        return masks

    def macs(self, shape: ViTShape, index: int) -> Tensor:
        """Return the multiply-adds of what is kept; all heads attend as the widest one does."""
        masks, block = self.masks(), shape.blocks[index]
        dims = masks.get("mixed", torch.zeros(1, 1)).sum(dim=1)  # [H]
        heads = self.groups["heads"].kept().sum() if "heads" in self.groups else dims.sum()
        padding = block.tokens**2 * (heads * dims.amax() - dims.sum())
        hidden = masks.get("neuron", torch.zeros(1)).sum()
        return linear_macs(shape, index, heads * block.qk_dim, dims.sum(), hidden) + padding
