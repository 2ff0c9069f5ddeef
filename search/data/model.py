"""The dense model of a sweep, with errors that name the sweep's keys."""

from __future__ import annotations

from pathlib import Path

from pruners import PrunableViT
from search.data.decode import ImageSpec
from search.sweep.parts import ModelSpec
from search.sweep.spec import SweepError


def load_model(spec: ModelSpec) -> PrunableViT:
    """Build the model that a sweep names, on the CPU, with its weights and its normalisation.

    Raises:
        SweepError: If it cannot be built, or if the normalisation of its input is not known.
    """
    try:
        vit = _build(spec)
    except (ValueError, FileNotFoundError, RuntimeError, TypeError) as error:
        raise SweepError(f"model: {error}") from error
    vit.mean = tuple(spec.mean) if spec.mean is not None else vit.mean
    vit.std = tuple(spec.std) if spec.std is not None else vit.std
    channels = vit.vit.in_chans
    for key, values in (("mean", vit.mean), ("std", vit.std)):
        if values is None or len(values) != channels:
            raise SweepError(
                f"model.{key} is {values}; "
                f"give one number for each of the model's {channels} channels"
            )
    if vit.vit.num_classes < 2:
        raise SweepError(
            f"model has {vit.vit.num_classes} classes; "
            "give model.args.num_classes and weights with a head"
        )
    return vit


def image_spec(vit: PrunableViT) -> ImageSpec:
    """Return the preparation of images for a model.

    Raises:
        AssertionError: If the model has no normalisation, which `load_model` sets.
    """
    shape = vit.shape()
    if vit.mean is None or vit.std is None:
        raise AssertionError("load_model sets the normalisation")
    return ImageSpec(size=shape.image, channels=shape.channels, mean=vit.mean, std=vit.std)


def _build(spec: ModelSpec) -> PrunableViT:
    if spec.path is None:
        if spec.name is None:
            raise AssertionError("a sweep names a path or a model")
        return PrunableViT.from_timm(spec.name, pretrained=spec.pretrained, **spec.args)
    if Path(spec.path).is_dir():
        return PrunableViT.load(spec.path)
    return PrunableViT.from_safetensors(spec.path, spec.name, **spec.args)
