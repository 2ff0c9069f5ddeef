"""Models on disk: `model.safetensors` and `shape.json` in one directory.

They open again without the plan that made them. Nothing is unpickled: weights are safetensors, the
rest is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pruners.families.pruner import ReducesTokens, load_method
from pruners.model.architecture import MOST_PER_STORED, build, check_size
from pruners.model.files import load_weights, read_safetensors, replace_file, write_tensors
from pruners.model.masks import nonzero_mask
from pruners.model.shape import ViTShape
from pruners.model.surgery import cut_to_shape
from pruners.model.vit import ViT

WEIGHTS, SHAPE = "model.safetensors", "shape.json"
FORMAT = 2

Model = TypeVar("Model", bound=ViT)


def save(vit: ViT, path: Path, measured: Mapping[str, Any]) -> None:
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
    write_tensors(path / WEIGHTS, state)
    replace_file(
        path / SHAPE, lambda temporary: temporary.write_text(json.dumps(description, indent=1))
    )


def load(path: Path, kind: type[Model]) -> Model:
    """Open a directory written by `save` as a model of that kind, on the CPU.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files do not describe a model.
    """
    description = read_description(path)
    state, _ = read_safetensors(path / WEIGHTS)
    try:
        return _rebuilt(kind, description, state)
    except KeyError as error:
        raise ValueError(
            f"{path / SHAPE} lacks {error}; give what PrunableViT.save writes"
        ) from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path / SHAPE}: {error}") from error


def _rebuilt(
    kind: type[Model], description: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Model:
    arch, given = description["arch"], description["input"]
    shape = ViTShape.from_json(description["shape"])
    name, args = arch["name"], arch["args"]
    if not isinstance(args, dict):
        raise ValueError(f"arch.args is {args!r}; give a table")
    stored = sum(tensor.numel() for tensor in state.values())
    check_size(name, args, most=MOST_PER_STORED * stored)
    statistics = {key: _per_channel(key, given[key], shape.channels) for key in ("mean", "std")}
    vit = kind(**{**build(name, args), **statistics})
    cut_to_shape(vit, shape)
    if (step := description["token_step"]) is not None:
        method, thresholds = step["method"], dict(step["thresholds"])
        pruner = load_method(method, **step["options"])
        if not isinstance(pruner, ReducesTokens):
            raise ValueError(f"token_step {method!r} reduces no tokens; give a token method")
        pruner.check(vit.shape(), thresholds)
        pruner.place(vit, thresholds)
    load_weights(vit.vit, state, source=WEIGHTS)
    layers = dict(vit.linears())
    if unknown := sorted(shape.nonzero.keys() - layers.keys()):
        raise ValueError(f"nonzero has {unknown[0]!r}, which is no layer of this model")
    vit.masks = {
        site: nonzero_mask(layers[site].weight, kept, site) for site, kept in shape.nonzero.items()
    }
    if vit.shape() != shape:
        raise ValueError(f"{WEIGHTS} holds a model of another shape than its {SHAPE} says")
    return vit


def _per_channel(key: str, values: object, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != channels
        or not all(type(v) in (int, float) and math.isfinite(v) for v in values)
        or (key == "std" and min(values) <= 0.0)
    ):
        raise ValueError(f"input.{key} is {values!r}; give {channels} numbers, one per channel")
    return tuple(float(value) for value in values)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not of format {FORMAT}; this version reads format {FORMAT} only"
        )
    return description
