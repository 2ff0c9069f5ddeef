"""The residual stream turned to its principal directions, so that a narrower one loses little.

SliceGPT (Ashkboos et al., 2024, arXiv:2401.15024, section 3): a model whose norms are RMSNorm
computes the same in any orthogonal basis of its residual stream. A LayerNorm becomes one once its
scale and bias are folded into what reads it and everything that writes is centred. In the basis of
the stream's principal directions the last channels hold next to nothing, and can be cut.

Departure from the paper: one rotation for all blocks, so that residual additions stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.model.architecture import build
from pruners.model.files import load_weights
from pruners.model.tokens import Tokens
from pruners.model.types import Batches
from pruners.model.vit import ViT, eval_mode

EPS = 1e-6
"""Of timm's LayerNorm in Vision Transformers, and of its RMSNorm."""

Model = TypeVar("Model", bound=ViT)


@torch.no_grad()
def rotated(vit: Model, batches: Batches) -> Model:
    """Return a model that computes the same with RMSNorm, in its stream's principal directions.

    Channels are ordered, those that hold most first. The model is a timm model as well: that of the
    same arguments but for `norm_layer`, and without LayerScale.

    Args:
        vit: A dense model with LayerNorm, which is left as it was.
        batches: Calibration images; their labels are not used.

    Raises:
        ValueError: If the model is cut, or has a part that does not compute the same in any basis.
    """
    check_turns(vit)
    directions = principal_directions(vit, batches)  # [D, D]
    assert vit.arch is not None
    args = {**vit.arch["args"], "norm_layer": "rmsnorm"}
    if vit.shape().layer_scale:
        args["init_values"] = 0.0
    parts = build(vit.arch["name"], args) | {"mean": vit.mean, "std": vit.std}
    own = next(vit.parameters())
    parts["vit"].to(own.device, own.dtype)
    state = {name: tensor.to(own.dtype) for name, tensor in _turned(vit, directions).items()}
    load_weights(parts["vit"], state, source="the rotated model")
    return type(vit)(**parts).train(vit.training)


@torch.no_grad()
def principal_directions(vit: ViT, batches: Batches) -> Tensor:
    """Return the eigenvectors [D, D] of the stream's second moments, as columns, largest first.

    The moments are those of all tokens in front of all blocks and of the last norm, normalised as
    norms see them. The last direction is that of the mean, which norms do not see.

    Raises:
        ValueError: If there are no images.
    """
    dim, device = vit.vit.embed_dim, next(vit.parameters()).device
    moments = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    with eval_mode(vit):
        for images, _ in batches:
            tokens = Tokens(vit.embed(images.to(device)))
            for block in (*vit.blocks, None):
                x = F.layer_norm(tokens.x.double(), (dim,)).flatten(0, 1)  # [B * N, D]
                moments += x.T @ x
                tokens = block(tokens) if block is not None else tokens
    if not bool(moments.any()):
        raise ValueError("there are no calibration images; give at least one batch")
    return torch.linalg.eigh(moments).eigenvectors.flip(1)


def _turned(vit: ViT, directions: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the rotated model in float64, by timm's names."""
    state = {name: tensor.double() for name, tensor in vit.vit.state_dict().items()}
    centred = directions - directions.mean(0)  # [D, D]; a row vector of the stream times it
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if name in state:
            state[name] = state[name] @ centred
    for layer, scale in _writers(vit):
        factor = state.pop(f"{scale}.gamma", torch.ones_like(directions[0]))
        weight = state[f"{layer}.weight"]  # [D, in], or [D, channels, height, width]
        rows = centred.T * factor  # [D, D]
        state[f"{layer}.weight"] = (rows @ weight.flatten(1)).view_as(weight)
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"] = rows @ state[f"{layer}.bias"]
    for norm, layers in _readers(vit):
        scale, shift = state[f"{norm}.weight"], state.pop(f"{norm}.bias")
        state[f"{norm}.weight"] = torch.ones_like(scale)
        for layer in layers:
            weight = state[f"{layer}.weight"]  # [out, D]
            if f"{layer}.bias" in state:
                state[f"{layer}.bias"] = state[f"{layer}.bias"] + weight @ shift
            state[f"{layer}.weight"] = (weight * scale) @ directions
    return state


def _writers(vit: ViT) -> Iterator[tuple[str, str]]:
    """Yield (layer that writes to the stream, its LayerScale)."""
    yield "patch_embed.proj", ""
    for index in range(len(vit.blocks)):
        yield f"blocks.{index}.attn.proj", f"blocks.{index}.ls1"
        yield f"blocks.{index}.mlp.fc2", f"blocks.{index}.ls2"


def _readers(vit: ViT) -> Iterator[tuple[str, list[str]]]:
    """Yield (norm of the stream, the layers that read it)."""
    for index in range(len(vit.blocks)):
        yield f"blocks.{index}.norm1", [f"blocks.{index}.attn.qkv"]
        yield f"blocks.{index}.norm2", [f"blocks.{index}.mlp.fc1"]
    heads = ["head", *(["head_dist"] if hasattr(vit.vit, "head_dist") else [])]
    yield "norm" if isinstance(vit.vit.norm, nn.LayerNorm) else "fc_norm", heads


def check_turns(vit: ViT) -> None:
    """Refuse a model that `rotated` does not take.

    Raises:
        ValueError: If the model is cut, or has a part that does not compute the same in any basis.
    """
    if vit.arch is None:
        raise ValueError("arch of this model is unknown; build it with from_timm")
    shape, inner = vit.shape(), vit.vit
    whole = all(block.attn is not None and block.mlp is not None for block in vit.blocks)
    if vit.masks or vit.token_step is not None or not whole:
        raise ValueError("vit is cut; rotate the dense model")
    if shape.qk_norm:
        raise ValueError("q and k are normalised; rotate a model without qk_norm")
    if inner.global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool is {inner.global_pool!r}; give 'token' or 'avg'")
    for name in ("patch_embed.norm", "norm_pre"):
        if not isinstance(inner.get_submodule(name), nn.Identity):
            raise ValueError(f"{name} normalises the stream itself; rotate a model without it")
    for name, layers in _readers(vit):
        norm = inner.get_submodule(name)
        if not isinstance(norm, nn.LayerNorm) or norm.eps != EPS:
            raise ValueError(f"{name} is {norm}; give LayerNorm with eps = {EPS:g}")
        for layer in layers:
            module = inner.get_submodule(layer)
            if not isinstance(module, nn.Linear) or module.bias is None:
                raise ValueError(f"{layer} is {module}; give a linear layer with a bias")
