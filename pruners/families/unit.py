"""The unit family: heads, head dims, neurons, channels, written channels, whole branches go."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pruners.families.allocation import rank_globally, rank_with_width
from pruners.families.options import option
from pruners.families.pruner import Pruner
from pruners.families.ragged import RaggedHeads
from pruners.model.compensation import compensate
from pruners.model.ranking import cut_attention, cut_mlp, highest, slice_scores
from pruners.model.shape import BlockShape, ViTShape, units_kept
from pruners.model.sites import RAGGED, WHOLE, WIDTH, kind_of, unit_sites
from pruners.model.surgery import (
    keep_attention_writes,
    remove_attention,
    remove_mlp,
)
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.uncut import Uncut
from pruners.model.vit import ViT
from pruners.model.width import keep_width, narrowed, writes_everywhere


@dataclass(frozen=True, kw_only=True)
class UnitPruner(Pruner, abc.ABC):
    """A method that scores units.

    Sites and their scores, in block i:

    - `blocks.<i>.attn.head` [H] and `blocks.<i>.mlp.neuron` [F]; a threshold of 1 removes the
      whole branch;
    - `blocks.<i>.attn.qk_dim` [H, K], `blocks.<i>.attn.v_dim` [H, V], and `blocks.<i>.attn.dim`
      [H, K], which is both at once: each head loses the same number, at positions of its own;
    - `blocks.<i>.attn.heads.<h>.dim` [K] and `.v_dim` [V] (kinds `ragged_dim`, `ragged_v_dim`):
      head h loses a share of its own, and with a threshold of 1 goes as a whole;
    - `blocks.<i>.attn.attn_out` [D] and `blocks.<i>.mlp.mlp_out` [D]: residual channels that the
      branch no longer writes to;
    - `blocks.<i>.block` [1]: with a threshold of 1 both branches go, with a smaller one none.

    `width` [D] are the channels of the residual stream, removed everywhere at once. There is no
    such site where branches write to some channels only.

    Where q and k are normalised over a head's width, their dims stay and only v's go.

    Attributes:
        units: The kinds of units this step may cut.
        multiple: What the numbers of dims, neurons and channels that stay are rounded to.
        compensate: Whether the weights that stay are solved anew, so that they take over what those
            that went have said (`pruners.model.compensation`); it takes calibration images.
    """

    family: ClassVar[str] = "unit"
    whole_sites: ClassVar[bool] = True

    units: tuple[str, ...] = ("head", "neuron")
    multiple: int = option(1, low=1)
    compensate: bool = True

    def __post_init__(self) -> None:
        """Check also that the kinds of units fit the method and each other."""
        super().__post_init__()
        wrong = [unit for unit in self.units if unit not in self.kinds()]
        if wrong or not self.units:
            raise ValueError(
                f"option units of {self.name} is {list(self.units)}; "
                f"give some of {list(self.kinds())}"
            )
        dims = [unit for unit in self.units if unit.endswith("dim")]
        alone = [unit for unit in dims if unit not in ("qk_dim", "v_dim")]
        if (alone and len(dims) > 1) or (set(dims) & set(RAGGED) and "head" in self.units):
            raise ValueError(
                f"option units of {self.name} is {list(self.units)}, whose head dims overlap; "
                f"give {alone[0]!r} without other dims"
                + (" or heads" if alone[0] in RAGGED else "")
            )
        writes = [unit for unit in self.units if unit.endswith("_out")]
        if WIDTH in self.units and writes:
            raise ValueError(
                f"option units of {self.name} is {list(self.units)}; give {WIDTH!r} without "
                f"{writes[0]!r}, which counts the channels that it cuts"
            )

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The kinds of units that the method can score."""
        return ("head", "qk_dim", "v_dim", "neuron")

    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return the sites of the wanted kinds and their number of units (of dims: per head)."""
        width = WIDTH in self.units and writes_everywhere(shape)
        return ({WIDTH: shape.dim} if width else {}) | {
            site: count
            for index, block in enumerate(shape.blocks)
            for kind in self.units
            for site, count in unit_sites(shape, block, index, kind)
        }

    def check(self, shape: ViTShape, thresholds: Thresholds) -> None:
        """Check also that no threshold removes all dims of all heads: that is removing the heads.

        Raises:
            ValueError: For an unknown site or a share out of range.
        """
        if WIDTH in thresholds and WIDTH in self.units and not writes_everywhere(shape):
            raise ValueError(
                f"threshold of {WIDTH!r} is given for a network whose branches write to some "
                "channels only; cut the width before what branches write"
            )
        super().check(shape, thresholds)
        for site, share in thresholds.items():
            if share == 1.0 and kind_of(site) not in WHOLE:
                raise ValueError(
                    f"threshold of {site} is 1; give a share below 1, or 1 for the block's heads "
                    "or neurons"
                )

    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape with fewer units."""
        self.check(shape, thresholds)
        shape = narrowed(shape, units_kept(shape.dim, thresholds.get(WIDTH, 0.0), self.multiple))
        blocks, nonzero = [], dict(shape.nonzero)
        for index, block in enumerate(shape.blocks):
            kept = dict(_units_kept(self, shape, block, index, thresholds))
            heads = RaggedHeads.of(self.units, shape, index, thresholds)
            zeros = heads.shrink(kept, self.multiple) if heads else None
            qkv_rows, v_columns = zeros or (0, 0)
            if kept.pop("block", 1) == 0:
                kept |= {"heads": 0, "hidden": 0}
            if "dim" in kept:
                kept["v_dim"] = kept.pop("dim")
                kept |= {} if shape.qk_norm else {"qk_dim": kept["v_dim"]}
            blocks.append(_without_empty_branches(dataclasses.replace(block, **kept)))
            if zeros and blocks[-1].heads:
                nonzero[f"blocks.{index}.attn.qkv"] = qkv_rows * shape.dim
                nonzero[f"blocks.{index}.attn.proj"] = v_columns * blocks[-1].attn_out
        return dataclasses.replace(shape, blocks=tuple(blocks), nonzero=nonzero)

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Rank all units of all sites together, by score per MAC; the width by itself."""
        steps = {site: slice_scores(scores[site]) for site in self.sites(shape)}
        if WIDTH in steps:
            return rank_with_width(shape, steps, self.shrink, macs)
        return rank_globally(shape, steps, lambda shares: self.shrink(shape, shares), macs)

    def cut(self, vit: ViT, scores: Scores, thresholds: Thresholds) -> None:
        """Remove the units of lowest score: heads before the dims of the heads that stay."""
        before = vit.shape()
        target = self.shrink(before, thresholds)
        check_scores(self, before, scores, thresholds)
        if target.dim < before.dim:  # first: what is masked or left unwritten has its final shape
            keep_width(vit, highest(scores[WIDTH], target.dim))
        for index, (block, shape) in enumerate(zip(vit.blocks, target.blocks, strict=True)):
            if block.attn is not None and shape.heads == 0:
                remove_attention(block)
            elif block.attn is not None:
                # Written channels go first: the padding's masks have proj's final shape.
                if shape.attn_out < block.attn.proj.out_features:
                    writes = scores[f"blocks.{index}.attn.attn_out"]
                    keep_attention_writes(block, highest(writes, shape.attn_out))
                if heads := RaggedHeads.of(self.units, before, index, thresholds):
                    for layer, mask in heads.cut(block.attn, scores, self.multiple).items():
                        vit.masks[f"blocks.{index}.attn.{layer}"] = mask
                cut_attention(block, shape, scores, f"blocks.{index}.attn")
            if block.mlp is not None and shape.hidden == 0:
                remove_mlp(block)
            elif block.mlp is not None:
                cut_mlp(block, shape, scores, f"blocks.{index}.mlp")

    def prune(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Score, cut, and compensate what stays, in place."""
        uncut = self.cut_anew(vit, batches, thresholds)
        if uncut is not None:
            compensate(vit, uncut, batches)

    def cut_anew(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> Uncut | None:
        """Score, then do what `cut_scored` does."""
        return self.cut_scored(vit, batches, self.score(vit, batches), thresholds)

    def cut_scored(
        self, vit: ViT, batches: Batches, scores: Scores, thresholds: Thresholds
    ) -> Uncut | None:
        """Cut in place; return what the model was, if what stays is to be compensated.

        The width goes before, and is compensated at once, with all other units still there: they
        are then brought toward the model of that width.
        """
        others = {site: share for site, share in thresholds.items() if site != WIDTH}
        if thresholds.get(WIDTH, 0.0) > 0.0:
            self._cut_width(vit, batches, scores, thresholds[WIDTH])
        uncut = None
        if self.compensate and any(others.values()):
            before, after = vit.shape().blocks, self.shrink(vit.shape(), others).blocks
            uncut = Uncut.of(
                vit,
                lambda marks: self.cut(marks, scores, others),
                narrows_queries=any(
                    0 < b.qk_dim < a.qk_dim for a, b in zip(before, after, strict=True)
                ),
            )
        self.cut(vit, scores, others)
        return uncut

    def _cut_width(self, vit: ViT, batches: Batches, scores: Scores, share: float) -> None:
        whole = copy.deepcopy(vit) if self.compensate else None
        channels = highest(scores[WIDTH], self.shrink(vit.shape(), {WIDTH: share}).dim)
        self.cut(vit, scores, {WIDTH: share})
        if whole is not None:
            compensate(vit, Uncut(vit=whole, channels=channels), batches)


def check_scores(pruner: Pruner, shape: ViTShape, scores: Scores, thresholds: Thresholds) -> None:
    """Refuse scores of another network than the one that is cut.

    Raises:
        ValueError: That names the site.
    """
    for site, units in pruner.sites(shape).items():
        if 0.0 < thresholds.get(site, 0.0) < 1.0 and scores[site].shape[-1] != units:
            raise ValueError(
                f"{pruner.name} has scores of {scores[site].shape[-1]} units at {site}, which has "
                f"{units}; give scores of this network"
            )


_FIELDS = {
    "head": "heads",
    "qk_dim": "qk_dim",
    "v_dim": "v_dim",
    "dim": "dim",
    "neuron": "hidden",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "block": "block",
}


def _units_kept(
    pruner: UnitPruner, shape: ViTShape, block: BlockShape, index: int, thresholds: Thresholds
) -> Iterator[tuple[str, int]]:
    """Yield (field of the block's shape, units that stay) of the kinds that are not ragged."""
    for kind in pruner.units:
        if kind not in RAGGED:
            for site, units in unit_sites(shape, block, index, kind):
                multiple = 1 if kind in ("head", "block") else pruner.multiple
                yield _FIELDS[kind], units_kept(units, thresholds.get(site, 0.0), multiple)


def _without_empty_branches(block: BlockShape) -> BlockShape:
    if block.heads == 0:
        block = dataclasses.replace(block, qk_dim=0, v_dim=0, attn_out=0)
    return block if block.hidden else dataclasses.replace(block, mlp_out=0)
