"""Pruned models as plain timm models: a checkpoint, and the script that opens it with timm alone.

timm's `VisionTransformer` gives all blocks the same sizes, but builds each by a function that it is
given; one that knows the sizes of every block is all that is needed where timm's own `Block` can
express what is left of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import timm
from torch import Tensor

from pruners.model.attention import Attention
from pruners.model.files import replace_file, write_tensors
from pruners.model.norm import NarrowRMSNorm
from pruners.model.vit import Block, ViT

WEIGHTS, SCRIPT = "timm.safetensors", "load_timm.py"


def why_not(vit: ViT) -> str:
    """Return, in one line, why plain timm cannot express a model; empty if it can."""
    if vit.arch is None:
        return "the model's architecture is unknown; build it with from_timm or from_state_dict"
    for index, block in enumerate(vit.blocks):
        if reason := _why_not(block):
            return f"blocks.{index} {reason}"
    return ""


def write_timm(vit: ViT, directory: str | Path) -> None:
    """Write `timm.safetensors`, and `load_timm.py`, which opens it as `vit` without this project.

    Blocks that have lost both branches are left out. Masked weights are zeros.

    Args:
        vit: The model.
        directory: Where both are written; made if needed.

    Raises:
        ValueError: If plain timm cannot express the model; see `why_not`.
    """
    if reason := why_not(vit):
        raise ValueError(f"plain timm cannot express the model: {reason}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, _state(vit))
    script = _script(vit)
    replace_file(directory / SCRIPT, lambda temporary: temporary.write_text(script))


def _why_not(block: Block) -> str:
    if block.front is not None or block.middle is not None:
        return "reduces the tokens, which timm's Block cannot"
    if block.attn is None and block.mlp is None:
        return ""
    if block.attn is None or block.mlp is None:
        gone = "attention" if block.attn is None else "MLP"
        return f"has lost its {gone} alone; timm's Block has both branches"
    if block.attn.qk_dim != block.attn.v_dim:
        return (
            f"has q and k of width {block.attn.qk_dim} but v of width {block.attn.v_dim}; "
            "timm's Attention has one width"
        )
    if block.attn_rows is not None or block.mlp_rows is not None:
        return "writes to some residual channels only; timm's Block writes to all"
    return ""


def _kept(vit: ViT) -> list[tuple[int, Block, Attention, int]]:
    """Return index, block, attention and neurons of the blocks that are left."""
    return [
        (index, block, block.attn, block.mlp.fc1.out_features)
        for index, block in enumerate(vit.blocks)
        if block.attn is not None and block.mlp is not None
    ]


def _state(vit: ViT) -> dict[str, Tensor]:
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in vit.vit.state_dict().items()
        if not name.startswith("blocks.")
    }
    for place, (_, block, attn, _) in enumerate(_kept(vit)):
        own = {name: tensor.detach().cpu() for name, tensor in block.state_dict().items()}
        # timm divides q k^T by the root of the width that is left, the model by that of the whole.
        factor = attn.scale * math.sqrt(attn.qk_dim)
        for name in ("attn.qkv.weight", "attn.qkv.bias"):
            if name in own and not math.isclose(factor, 1.0):
                own[name] = own[name].clone()
                own[name][: attn.heads * attn.qk_dim] *= factor
        state |= {f"blocks.{place}.{name}": tensor.contiguous() for name, tensor in own.items()}
    for name, norm in _narrow_norms(vit):
        state[f"{name}.weight"] = state[f"{name}.weight"] * norm.gain
    return state


def _narrow_norms(vit: ViT) -> Iterator[tuple[str, NarrowRMSNorm]]:
    """Yield (timm's name, norm) of those that count lost channels as zeros."""
    places = {index: place for place, (index, *_) in enumerate(_kept(vit))}
    for name, norm in vit.vit.named_modules():
        if isinstance(norm, NarrowRMSNorm):
            parts = name.split(".")
            if parts[0] != "blocks":
                yield name, norm
            elif (place := places.get(int(parts[1]))) is not None:
                yield f"blocks.{place}.{parts[2]}", norm


def _script(vit: ViT) -> str:
    assert vit.arch is not None
    name, kept = vit.arch["name"], _kept(vit)
    own = {"depth", "embed_dim"}
    args = {key: value for key, value in vit.arch["args"].items() if key not in own}
    return SCRIPT_TEXT.format(
        version=timm.__version__,
        imports="import timm\n" if name is not None else "",
        more="" if name is not None else ", VisionTransformer",
        mean=vit.mean,
        std=vit.std,
        dim=vit.vit.embed_dim,
        blocks="".join(
            f"    ({attn.heads}, {attn.v_dim}, {neurons}),  # block {index} of the dense model\n"
            for index, _, attn, neurons in kept
        ),
        build="VisionTransformer(" if name is None else f"timm.create_model({name!r}, ",
        args="".join(f"{key}={value!r}, " for key, value in args.items()),
        weights=WEIGHTS,
        eps="".join(
            f"vit.{_indexed(name)}.eps = {norm.eps * norm.gain**2!r}\n"
            for name, norm in _narrow_norms(vit)
        ),
    )


def _indexed(name: str) -> str:
    """Return a module's name as Python reads it: `blocks[0].norm1` of `blocks.0.norm1`."""
    first, *rest = name.split(".")
    return ".".join([f"{first}[{rest[0]}]", *rest[1:]]) if rest else first


SCRIPT_TEXT = '''"""Opens a pruned Vision Transformer with timm alone (written for timm {version}).

    from load_timm import vit

    logits = vit(images)  # [B, channels, height, width], normalised by MEAN and STD
"""

from pathlib import Path

{imports}from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.vision_transformer import Block{more}

MEAN, STD = {mean}, {std}
DIM = {dim}
BLOCKS = [  # heads, width of each head, neurons
{blocks}]


def attention(width):
    class Heads(Attention):
        def __init__(self, dim, **args):
            super().__init__(dim, attn_head_dim=width, **args)

    return Heads


def block(depth, **args):
    heads, width, neurons = BLOCKS[depth]
    args |= {{"num_heads": heads, "attn_layer": attention(width)}}
    args |= {{"mlp_ratio": (neurons + 0.5) / DIM}}  # timm rounds down
    return Block(depth=depth, **args)


vit = {build}{args}embed_dim=DIM, depth=len(BLOCKS), block_fn=block)
{eps}vit.load_state_dict(load_file(Path(__file__).with_name("{weights}")), strict=True)
vit.eval()
'''
