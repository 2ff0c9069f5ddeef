"""Sites of units: their names, and how many units each has."""

from __future__ import annotations

from collections.abc import Iterator

from pruners.model.shape import BlockShape, ViTShape

KINDS = {
    "head": "attn",
    "qk_dim": "attn",
    "v_dim": "attn",
    "dim": "attn",
    "ragged_dim": "attn",
    "ragged_v_dim": "attn",
    "attn_out": "attn",
    "neuron": "mlp",
    "mlp_out": "mlp",
    "block": "",
    "width": "",
}
"""Kind of unit -> the branch it belongs to."""

WIDTH = "width"
"""The one site of the kind `width`: residual channels of the whole network, in no block."""

RAGGED = ("ragged_dim", "ragged_v_dim")
WHOLE = ("head", "neuron", "block", *RAGGED)
"""Kinds whose site may go as a whole."""


def kind_of(site: str) -> str:
    """Return the kind of unit that a site is about."""
    parts = site.split(".")
    return f"ragged_{parts[-1]}" if "heads" in parts else parts[-1]


def block_of(site: str) -> int:
    """Return the number of the block that a site is in; every site but the width's is in one."""
    return int(site.split(".")[1])


def unit_sites(
    shape: ViTShape, block: BlockShape, index: int, kind: str
) -> Iterator[tuple[str, int]]:
    """Yield the sites of one kind in one block, with their numbers of units (of dims: per head)."""
    both = block.v_dim if block.qk_dim == block.v_dim or shape.qk_norm else 0
    counts = {
        "head": block.heads,
        "qk_dim": 0 if shape.qk_norm else block.qk_dim,
        "v_dim": block.v_dim,
        "dim": both,
        "ragged_dim": both,
        "ragged_v_dim": block.v_dim,
        "attn_out": block.attn_out,
        "neuron": block.hidden,
        "mlp_out": block.mlp_out,
        "block": int(block.heads + block.hidden > 0),
    }
    if counts.get(kind, 0) == 0:  # absent: a kind that a method adds, and handles itself
        return
    if kind in RAGGED:
        for head in range(block.heads):
            yield ragged_site(index, head, kind), counts[kind]
    elif kind == "block":
        yield block_site(index), 1
    else:
        yield f"blocks.{index}.{KINDS[kind]}.{kind}", counts[kind]


def ragged_site(index: int, head: int, kind: str) -> str:
    """Return the site of one head's own dims."""
    return f"blocks.{index}.attn.heads.{head}.{kind.removeprefix('ragged_')}"


def block_site(index: int) -> str:
    """Return the site of a whole block."""
    return f"blocks.{index}.block"
