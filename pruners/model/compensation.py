"""Compensation of a unit cut: the weights that stay take over what those that went have said.

The linear layers are solved anew, block by block from the front, each on what the already cut model
gives it. Layers that write to the residual stream (proj, fc2) are brought by least squares toward
the uncut model's stream behind the same branch. So a removed unit is predicted from those that
stay, as in CORP (arXiv:2602.05243) and GRAIL (2602.23795), its mean goes into the bias, as in VBP
(2507.12988), and what layers in front have left wrong is made up for, which these do not do. Layers
that read the stream (qkv, fc1) are brought toward what they would say of the uncut model's. With
inputs a of a layer W a + b, and e what its output lacks,

    D, c = argmin mean |e - D a - c|^2 + damping * s |D|^2,    W += D,    b += c,

s the mean variance of a. Without an error in front D is W_R S_RK (S_KK + damping * s I)^-1 of the
units R that went and K that stay. q/k dims: see `pruners.model.logits`. What a removed branch wrote
on average goes into the bias of the layer that wrote before it.

Where tokens are reduced both streams are those of the cut model from there on, so that tokens are
compared that are really there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from pruners.model.attention import Attention
from pruners.model.least_squares import Moments
from pruners.model.logits import fold_keys
from pruners.model.masks import apply_masks
from pruners.model.solved_layer import Layer, Writer
from pruners.model.tokens import Tokens
from pruners.model.types import Batches
from pruners.model.uncut import Uncut
from pruners.model.vit import Block, ViT, eval_mode

DAMPING = 1e-3
"""Relative damping of the solves."""

Advance = Callable[[Tokens], Tokens]
Part = TypeVar("Part", Tensor, Block)
Queries = tuple[Attention, Tensor]
"""An attention, and which of its q rows, [H', K'], those of the cut one were."""


class _Streams(NamedTuple):
    """A batch on its way through both models.

    Attributes:
        tokens: In the cut model.
        whole: [B, N, D], the stream of the uncut one.
    """

    tokens: Tokens
    whole: Tensor


@torch.no_grad()
def compensate(vit: ViT, uncut: Uncut, batches: Batches, damping: float = DAMPING) -> None:
    """Move the weights that stay, in place, toward what the uncut model does.

    Args:
        vit: The model: units cut, tokens reduced, no weights masked but padding.
        uncut: What it was before the units were cut.
        batches: Calibration images; their labels are not used.
        damping: Relative damping of the solves.

    Raises:
        ValueError: If there are no images, or a system cannot be solved; the message names its
            layer.
    """
    device = next(vit.parameters()).device
    aim = uncut.vit if uncut.aim is None else uncut.aim
    embed_alike = uncut.aim is None and uncut.channels is None
    with eval_mode(vit), eval_mode(uncut.vit), eval_mode(aim):
        streams = []
        for images, _ in batches:
            x = images.to(device)
            own = _exact(vit.embed(x))
            whole = own if embed_alike else _exact(aim.embed(x))
            streams.append(_Streams(Tokens(own), whole))
        if not streams:
            raise ValueError(
                "compensate is true, but there are no calibration images; give batches of images, "
                "or compensate = false"
            )
        walk = _Walk(streams, damping, uncut.channels)
        solved = [_exact(block) for block in vit.blocks]
        while solved and solved[-1].attn is None and solved[-1].mlp is None:
            solved.pop()  # nothing is left behind that could make up for it
        for index, block in enumerate(solved):
            queries = None
            if uncut.query_rows and (before := _exact(uncut.vit.blocks[index]).attn) is not None:
                queries = before, uncut.query_rows[index]
            walk.through(f"blocks.{index}", block, _exact(aim.blocks[index]), queries)
    for block, exact in zip(vit.blocks, solved, strict=False):
        if block is not exact:
            block.load_state_dict(exact.state_dict())
    apply_masks(dict(vit.linears()), vit.masks)


class _Walk:
    """Goes through both models, block by block, and corrects the cut one.

    Attributes:
        streams: The batches, as far as they have come.
        equal: Whether both streams are the same in every batch.
        writer: Who wrote last to the streams as they are.
    """

    def __init__(self, streams: list[_Streams], damping: float, channels: Tensor | None) -> None:
        """Start in front of the first block."""
        self.streams, self.damping, self.channels = streams, damping, channels
        self.equal = all(tokens.x is whole for tokens, whole in streams)
        self.writer: Writer | None = None

    def through(self, name: str, block: Block, whole: Block, queries: Queries | None) -> None:
        """Pass a block; both are in float32 or float64.

        Args:
            name: Its name.
            block: The cut model's; its weights are corrected.
            whole: The uncut model's.
            queries: Its attention before q/k dims were cut, if they were.
        """
        if block.front is not None:
            self._go(block.front, None)
        if whole.attn is not None:
            ahead = self._ahead(whole.attend)
            self._attention(name, block, whole.attn, whole.norm1, queries, ahead)
            self._go(block.attend, ahead if block.middle is None else None)
        if whole.mlp is not None:
            ahead = self._ahead(whole.feed)
            self._mlp(name, block, whole.mlp, whole.norm2, ahead)
            self._go(block.feed, ahead)

    def _attention(
        self,
        name: str,
        block: Block,
        whole: Attention,
        whole_norm: nn.Module | None,
        queries: Queries | None,
        ahead: list[Tensor],
    ) -> None:
        attn, norm, scale = block.attn, block.norm1, block.ls1
        if attn is None or norm is None or scale is None:
            self._miss(ahead)
            return
        reader = Layer(f"{name}.attn.qkv", attn.qkv)
        if queries is not None and attn.qk_dim < queries[0].qk_dim:
            inputs = (norm(s.tokens.x) for s in self.streams)
            if not fold_keys(attn, *queries, inputs, self.damping):
                raise reader.unsolvable(self.damping)
        self._read(reader, norm, whole.qkv, whole_norm)

        def mixed(tokens: Tokens) -> Tensor:
            return attn.mix(norm(tokens.x), tokens.size, tokens.policy).output

        layer = Layer(f"{name}.attn.proj", attn.proj)
        writer = Writer(layer, scale, block.attn_rows)
        same = _equal(attn.qkv, whole.qkv) and _equal(attn.proj, whole.proj)
        self._correct(writer, mixed, ahead, same)

    def _mlp(
        self,
        name: str,
        block: Block,
        whole: Mlp,
        whole_norm: nn.Module | None,
        ahead: list[Tensor],
    ) -> None:
        mlp, norm, scale = block.mlp, block.norm2, block.ls2
        if mlp is None or norm is None or scale is None:
            self._miss(ahead)
            return

        reader = Layer(f"{name}.mlp.fc1", mlp.fc1)
        self._read(reader, norm, whole.fc1, whole_norm)

        def neurons(tokens: Tokens) -> Tensor:
            found: Tensor = mlp.norm(mlp.drop1(mlp.act(mlp.fc1(norm(tokens.x)))))
            return found

        layer = Layer(f"{name}.mlp.fc2", mlp.fc2)
        writer = Writer(layer, scale, block.mlp_rows)
        same = _equal(mlp.fc1, whole.fc1) and _equal(mlp.fc2, whole.fc2)
        self._correct(writer, neurons, ahead, same)

    def _ahead(self, branch: Advance) -> list[Tensor]:
        """Return the uncut model's streams behind a branch of it, [B, N, D] each."""
        return [branch(s.tokens._replace(x=s.whole)).x for s in self.streams]

    def _go(self, advance: Advance, ahead: list[Tensor] | None) -> None:
        """Let the cut model's tokens go on; without streams ahead both are the same from here."""
        moved = [advance(s.tokens) for s in self.streams]
        wanted = [tokens.x for tokens in moved] if ahead is None else ahead
        self.streams = [_Streams(t, w) for t, w in zip(moved, wanted, strict=True)]
        if ahead is None:
            self.equal, self.writer = True, None

    def _left(self, stream: Tensor) -> Tensor:
        """Return the channels that stay of the uncut model's stream [B, N, D]."""
        return stream if self.channels is None else stream[..., self.channels.to(stream.device)]

    def _read(
        self, layer: Layer, norm: nn.Module, whole: nn.Linear, whole_norm: nn.Module | None
    ) -> None:
        """Let a layer that reads the stream say what it would say of the uncut model's.

        Of a narrower stream all units are still there, so the uncut layer says it.
        """
        if self.equal:
            return
        if self.channels is None or whole_norm is None:
            whole, whole_norm = layer.linear, norm
        moments = Moments()
        for tokens, stream in self.streams:
            a = norm(tokens.x)
            lacks = whole(whole_norm(stream)) - layer.linear(a)
            moments.add(a.flatten(0, 1), lacks.flatten(0, 1))
        layer.solve(moments, self.damping)

    def _correct(
        self, writer: Writer, hidden: Callable[[Tokens], Tensor], ahead: list[Tensor], same: bool
    ) -> None:
        """Solve a layer; nothing is to do as long as nothing was cut."""
        if not (self.equal and same):
            moments = Moments()
            for (tokens, _), wanted in zip(self.streams, ahead, strict=True):
                a = hidden(tokens)
                behind = writer.stream(writer.layer.linear(a), tokens.x)
                lacks = writer.lacks(self._left(wanted), behind)
                moments.add(a.flatten(0, 1), lacks.flatten(0, 1))
            writer.layer.solve(moments, self.damping)
        self.equal = self.equal and same
        self.writer = writer

    def _miss(self, ahead: list[Tensor]) -> None:
        """Put what a removed branch wrote on average into the bias of the layer before it."""
        self.equal, writer = False, self.writer
        if writer is None or writer.layer.linear.bias is None:
            return
        tokens = sum(wanted.shape[0] * wanted.shape[1] for wanted in ahead)
        lacking = (
            writer.lacks(self._left(wanted), s.tokens.x).double().sum(dim=(0, 1))
            for s, wanted in zip(self.streams, ahead, strict=True)
        )
        bias = torch.stack(list(lacking)).sum(dim=0) / tokens
        writer.layer.add(None, bias)
        self.streams = [
            s._replace(tokens=s.tokens._replace(x=writer.stream(bias.to(s.tokens.x), s.tokens.x)))
            for s in self.streams
        ]


def _equal(layer: nn.Linear, other: nn.Linear) -> bool:
    return torch.equal(layer.weight, other.weight.to(layer.weight))


def _exact(part: Part) -> Part:
    """Return a tensor, or a block, in float32 or float64: itself if it is."""
    like = part if isinstance(part, Tensor) else next(part.parameters(), None)
    if like is None or like.dtype in (torch.float32, torch.float64):
        return part
    return part.float() if isinstance(part, Tensor) else copy.deepcopy(part).float()
