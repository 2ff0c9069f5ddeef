"""`PrunableViT`: how a model is built from timm's, opened and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from pruners import checkpoint
from pruners.model.architecture import build, check_size
from pruners.model.files import load_weights, read_safetensors
from pruners.model.rotation import rotated
from pruners.model.types import Batches
from pruners.model.vit import ViT


class PrunableViT(ViT):
    """A timm `VisionTransformer` that can lose units, tokens and weights, and be saved.

    Build one with `from_timm`, `from_safetensors`, `from_state_dict` or `load`; wrapping a model of
    your own with `PrunableViT(vit)` takes that model over (its blocks are replaced).
    """

    @classmethod
    def from_timm(cls, name: str, *, pretrained: bool = True, **args: Any) -> Self:
        """Build a timm model by name, with timm's own weights unless `pretrained` is false."""
        return cls(**build(name, args, pretrained=pretrained))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], name: str | None = None, **args: Any
    ) -> Self:
        """Build timm's `name`, or a plain `VisionTransformer(**args)`, with the given weights.

        Args:
            state: Name -> tensor [...], as the model's own `state_dict` gives them.
            name: A model of timm's.
            args: What differs from timm's `name`, or the arguments of `VisionTransformer`.

        Raises:
            ValueError: If the weights are not those of this architecture.
        """
        parts = build(name, args)
        load_weights(parts["vit"], state, source="the state dict")
        return cls(**parts)

    @classmethod
    def from_safetensors(cls, path: str | Path, name: str | None = None, **args: Any) -> Self:
        """Read weights from a safetensors file.

        Without `name` and `args` the file's metadata must hold `arch`: the arguments of
        `VisionTransformer` as JSON.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the architecture is unknown, or the weights are not those of it.
        """
        state, file_args = read_safetensors(Path(path))
        if name is None and not args and file_args is None:
            raise ValueError(f"model {path} says nothing of its architecture; give name or args")
        if name is None:
            args = {**(file_args or {}), **args}
        try:
            if name is None:
                check_size(name, args, most=10 * sum(tensor.numel() for tensor in state.values()))
            parts = build(name, args)
        except ValueError as error:
            raise ValueError(f"{error}; weights are those of {path}") from error
        load_weights(parts["vit"], state, source=str(path))
        return cls(**parts)

    def rotated(self, batches: Batches) -> Self:
        """Return a model that computes the same and loses little where its width is cut.

        Its residual stream is turned to its principal directions: see `pruners.model.rotation`.

        Args:
            batches: Calibration images; their labels are not used.

        Raises:
            ValueError: If the model is cut, or has a part that does not compute the same in any
                basis.
        """
        return rotated(self, batches)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a directory written by `save`."""
        return checkpoint.load(Path(path), cls)

    def save(self, path: str | Path, measured: Mapping[str, Any] | None = None) -> None:
        """Write a directory of `model.safetensors` and `shape.json` that `load` opens.

        Args:
            path: Directory; made if needed.
            measured: What was measured on this model (accuracy, speed), kept in `shape.json` for
                its users.
        """
        checkpoint.save(self, Path(path), measured or {})
