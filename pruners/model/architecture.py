"""timm's Vision Transformers, by name or by arguments that are checked before they are built."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

MOST_PER_STORED, MOST_BLOCKS = 1_000, 256
"""Dense parameters per stored one, and blocks, beyond which an architecture is absurd."""

_SIZES: dict[str, float] = {  # VisionTransformer's own
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "reg_tokens": 0,
}


def build(name: str | None, args: Mapping[str, Any], *, pretrained: bool = False) -> dict[str, Any]:
    """Build a timm model and return it with what is known of it: the arguments of `ViT`.

    Args:
        name: A timm model name, or None for a plain `VisionTransformer`.
        args: Constructor arguments; they must be JSON values, so that the architecture can be
            stored.
        pretrained: Load timm's own weights; only with a name.

    Raises:
        ValueError: For an unknown name or argument, with what would be right.
    """
    try:
        json.dumps(dict(args))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model args {args} cannot be stored ({error}); give JSON values"
        ) from error
    # With other arguments timm reads files, unpickles, or builds on another device.
    known = set(inspect.signature(VisionTransformer.__init__).parameters)
    known -= {"self", "device", "dtype"}
    if unknown := sorted(set(args) - known):
        raise ValueError(
            f"model args {unknown} are unknown; VisionTransformer takes {sorted(known)}"
        )
    arch = {"name": name, "args": dict(args)}
    if name is None:
        return {"vit": _built(lambda: VisionTransformer(**args), arch), "arch": arch}
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(str(name), timm.list_models(), 5, cutoff=0.0)
        raise ValueError(
            f"model name {name!r} is unknown to timm; names like it: {', '.join(near)}"
        )
    vit = _built(lambda: timm.create_model(name, pretrained=pretrained, **args), arch)
    config = getattr(vit, "pretrained_cfg", {}) or {}
    mean, std = config.get("mean"), config.get("std")
    if mean is not None and len(mean) != vit.in_chans:
        mean = std = None  # timm's statistics are those of RGB images
    return {"vit": vit, "arch": arch, "mean": mean, "std": std}


def _built(make: Callable[[], VisionTransformer], arch: Mapping[str, Any]) -> VisionTransformer:
    try:
        return make()
    except Exception as error:  # timm checks no arguments, so they go wrong anywhere in it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"model {arch['name'] or 'VisionTransformer'} with args {arch['args']} "
            f"cannot be built ({reason})"
        ) from error


def check_size(name: str | None, args: Mapping[str, Any], *, most: int) -> None:
    """Refuse, before it is built, a `VisionTransformer` that is absurd for its weights.

    Args:
        name: A timm model name, whose own sizes are not looked up, or None.
        args: Constructor arguments.
        most: Parameters that it may have, about.

    Raises:
        ValueError: If a size is no size, or if they make a model that could fill the memory.
    """
    own = _SIZES if name is None else dict.fromkeys(_SIZES, 1)
    sizes = {key: _area(key, args.get(key, default)) for key, default in own.items()}
    dim, patch = sizes["embed_dim"], sizes["patch_size"]
    tokens = sizes["img_size"] / patch + sizes["reg_tokens"]
    outer = dim * (tokens + sizes["in_chans"] * patch + sizes["num_classes"])
    dense = outer + sizes["depth"] * dim * dim * (4.0 + 2.0 * sizes["mlp_ratio"])
    if dense > most or sizes["depth"] > MOST_BLOCKS:
        raise ValueError(
            f"model args {dict(args)} make {dense:.2g} parameters in {sizes['depth']:.2g} blocks; "
            f"give the args of the stored weights: at most {most:.2g}, in at most {MOST_BLOCKS}"
        )


def _area(key: str, value: object) -> float:
    """Return a size; of an image or a patch, its area."""
    sides: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    least = 0 if key in ("num_classes", "reg_tokens") else 1
    many = key in ("img_size", "patch_size")
    kinds = (int, float) if key == "mlp_ratio" else (int,)
    whole = all(type(side) in kinds and least <= side <= 1e12 for side in sides)
    if not whole or len(sides) not in ((1, 2) if many else (1,)):
        raise ValueError(f"model args have {key} = {value!r}; give a size, at least {least}")
    return float(math.prod(sides) ** (2 if many and len(sides) == 1 else 1))
