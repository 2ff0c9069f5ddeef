"""Models on disk: `model.safetensors` and `shape.json` in one directory.

They open again without the plan that made them. Nothing is unpickled: weights are safetensors, the
rest is JSON.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners.masks import nonzero_mask
from pruners.pruner import ReducesTokens, load_method
from pruners.shape import ViTShape
from pruners.surgery import cut_to_shape
from pruners.vit import PrunableViT

WEIGHTS, SHAPE = "model.safetensors", "shape.json"
FORMAT = 2


def build(name: str | None, args: Mapping[str, Any], *, pretrained: bool = False) -> dict[str, Any]:
    """Build a timm model and return it with what is known of it: the arguments of `PrunableViT`.

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
    except TypeError as error:
        raise ValueError(
            f"model args {dict(args)} cannot be stored ({error}); give JSON values"
        ) from error
    arch = {"name": name, "args": dict(args)}
    if name is None:
        known = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self"}
        if unknown := sorted(set(args) - known):
            raise ValueError(
                f"model args {unknown} are unknown; VisionTransformer takes {sorted(known)}"
            )
        return {"vit": VisionTransformer(**args), "arch": arch}
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 5, cutoff=0.0)
        raise ValueError(
            f"model name {name!r} is unknown to timm; names like it: {', '.join(near)}"
        )
    vit = timm.create_model(name, pretrained=pretrained, **args)
    config = getattr(vit, "pretrained_cfg", {}) or {}
    mean, std = config.get("mean"), config.get("std")
    if mean is not None and len(mean) != vit.in_chans:
        mean = std = None  # timm's statistics are those of RGB images
    return {"vit": vit, "arch": arch, "mean": mean, "std": std}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a safetensors file and the `arch` of its metadata, if it has one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model {path} does not exist; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            arch = (file.metadata() or {}).get("arch")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, json.loads(arch) if arch else None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"model {path} is not a readable safetensors file ({error})") from error


def load_weights(vit: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict and name what does not fit.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    own = vit.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    if wrong:
        kind = "lacks" if wrong[0] in own else "has the unknown tensor"
        raise ValueError(
            f"{source} {kind} {wrong[0]} ({len(wrong)} tensors differ); "
            "give weights of this architecture"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(state[name].shape)}; "
                f"this architecture needs {tuple(tensor.shape)}"
            )
    vit.load_state_dict(dict(state))


def save(vit: PrunableViT, path: Path, measured: Mapping[str, Any]) -> None:
    """Write a model; see `PrunableViT.save`.

    Raises:
        ValueError: If the architecture is unknown, so that nobody could rebuild the model.
    """
    if vit.arch is None:
        raise ValueError(
            "arch of this model is unknown; "
            "build it with from_timm, from_safetensors or from_state_dict"
        )
    path.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "arch": vit.arch,
        "input": {"mean": vit.mean, "std": vit.std},
        "shape": vit.shape().to_json(),
        "token_step": vit.token_step,
        "measured": dict(measured),
    }
    state = {key: value.detach().cpu().contiguous() for key, value in vit.vit.state_dict().items()}
    replace_file(path / WEIGHTS, lambda temporary: save_file(state, temporary))
    replace_file(
        path / SHAPE, lambda temporary: temporary.write_text(json.dumps(description, indent=1))
    )


def load(path: Path) -> PrunableViT:
    """Open a directory written by `save`, on the CPU; see `PrunableViT.load`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files do not describe a model.
    """
    description = read_description(path)
    state, _ = read_safetensors(path / WEIGHTS)
    try:
        arch, stored = description["arch"], description["input"]
        shape = ViTShape.from_json(description["shape"])
        step = description["token_step"]
        tokens = (step["method"], step["options"], step["thresholds"]) if step else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path / SHAPE} lacks {error}; give what PrunableViT.save writes"
        ) from error
    parts = build(arch["name"], arch["args"])
    mean, std = (tuple(stored[key]) if stored[key] is not None else None for key in ("mean", "std"))
    vit = PrunableViT(**{**parts, "mean": mean, "std": std})
    cut_to_shape(vit, shape)
    if tokens is not None:
        method, options, thresholds = tokens
        pruner = load_method(method, **options)
        if not isinstance(pruner, ReducesTokens):
            raise ValueError(
                f"{path / SHAPE}: token_step {method!r} reduces no tokens; give a token method"
            )
        pruner.place(vit, thresholds)
    load_weights(vit.vit, state, source=str(path / WEIGHTS))
    layers = dict(vit.linears())
    vit.masks = {
        site: nonzero_mask(layers[site].weight, kept, site) for site, kept in shape.nonzero.items()
    }
    if vit.shape() != shape:
        raise ValueError(f"{path} holds a model of another shape than its {SHAPE} says")
    return vit


def read_description(path: Path) -> dict[str, Any]:
    """Return the content of `shape.json` in a saved model's directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not JSON of a format this version reads.
    """
    file = path / SHAPE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a directory written by PrunableViT.save"
        )
    try:
        description = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not of format {FORMAT}; this version reads format {FORMAT} only"
        )
    return description


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or not there."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, target)
