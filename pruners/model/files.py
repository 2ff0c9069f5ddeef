"""Tensors in files: checked when read, written as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

Written = TypeVar("Written")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors [...] of a safetensors file and its metadata's `arch`, if it has one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model {path} does not exist; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            arch = json.loads((file.metadata() or {}).get("arch", "null"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {path} is not a readable safetensors file ({reason})") from error
    if arch is not None and not isinstance(arch, dict):
        raise ValueError(f"model {path} has the arch {arch!r}; give VisionTransformer's arguments")
    return state, arch


def load_weights(vit: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict and name what does not fit.

    Args:
        vit: The module.
        state: Name -> tensor [...], of the shape that the module's own has.
        source: What errors call the state dict.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    own = vit.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    if wrong:
        kind = "lacks" if wrong[0] in own else "has the unknown tensor"
        raise ValueError(
            f"{source} {kind} {_printable(wrong[0])} ({len(wrong)} tensors differ); "
            "give weights of this architecture"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(state[name].shape)}; "
                f"this architecture needs {tuple(tensor.shape)}"
            )
        if state[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{source}: {name} is {state[name].dtype}; this architecture needs {tensor.dtype}"
            )
    vit.load_state_dict(dict(state))


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file of tensors [...] by name.

    Raises:
        OSError: If it cannot be written; safetensors' own writer raises an error of its own.
    """
    content = safetensors_bytes(tensors, metadata)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def replace_file(target: Path, write: Callable[[Path], Written]) -> Written:
    """Write a file under a temporary name and rename it, so that it is whole or as it was.

    Returns:
        What `write` returns. Whatever it raises, nothing of a temporary name is left.
    """
    temporary = temporary_name(target)
    try:
        written = write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def replace_directory(target: Path, write: Callable[[Path], Written]) -> Written:
    """Make a directory under a temporary name and rename it, so that it is whole or as it was.

    What was there before is moved aside first, and back if the new one cannot take its place.

    Returns:
        What `write` returns. Whatever it raises, nothing of a temporary name is left.
    """
    temporary = temporary_name(target)
    older = temporary.with_name(f"{temporary.name}.older")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        written = write(temporary)
        if target.exists():
            os.replace(target, older)
        try:
            os.replace(temporary, target)
        except OSError:
            if older.exists():
                os.replace(older, target)
            raise
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def temporary_name(target: Path) -> Path:
    """Return a hidden name beside a path, which no other process uses on any node."""
    return target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)
