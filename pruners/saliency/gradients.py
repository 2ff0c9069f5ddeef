"""Gradients of the training loss with respect to the weights of the linear layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruners.model.types import Batches
from pruners.model.vit import ViT, eval_mode


def batch_gradients(vit: ViT, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Yield, for each batch, site -> gradient of its mean cross-entropy, [out, in].

    The model runs in evaluation mode (no dropout), and neither its mode nor any `.grad` is changed
    by this.

    Raises:
        ValueError: If a weight is frozen.
    """
    layers = dict(vit.linears())
    check_layers(layers)
    weights = [layer.weight for layer in layers.values()]
    with evaluating(vit):
        for images, labels in batches:
            device = weights[0].device
            loss = F.cross_entropy(vit(images.to(device)), labels.to(device))
            yield dict(zip(layers, torch.autograd.grad(loss, weights), strict=True))


def sample_gradients(
    vit: ViT, images: Tensor, labels: Tensor, sites: Collection[str]
) -> dict[str, Tensor]:
    """Return site -> gradient of each image's own cross-entropy, [B, out, in].

    The gradient of a linear layer's weight for one image is the sum over its tokens of the outer
    product of the output's gradient and the input; so one forward and one backward pass serve all
    images (Goodfellow, 2015, arXiv:1510.01799, for layers applied to many tokens).

    Args:
        vit: The model, in evaluation mode.
        images: [B, channels, height, width].
        labels: [B].
        sites: The layers wanted.
    """
    layers = {site: layer for site, layer in vit.linears() if site in sites}
    with recorded(layers) as (inputs, outputs):
        loss = F.cross_entropy(vit(images), labels, reduction="sum")
    errors = torch.autograd.grad(loss, [outputs[site] for site in layers])
    return {
        site: torch.einsum("bno,bni->boi", error, inputs[site])
        for site, error in zip(layers, errors, strict=True)
    }


def check_layers(layers: dict[str, nn.Linear]) -> None:
    """Refuse layers whose gradients cannot be told apart.

    Raises:
        ValueError: That names the first one whose weight is frozen or shared.
    """
    owners: dict[int, str] = {}
    for site, layer in layers.items():
        if not layer.weight.requires_grad:
            raise ValueError(
                f"{site} is frozen (requires_grad is False); unfreeze it to measure gradients"
            )
        owner = owners.setdefault(id(layer.weight), site)
        if owner != site:
            raise ValueError(
                f"{site} shares its weight with {owner}; give each a weight of its own"
            )


@contextmanager
def evaluating(vit: ViT) -> Iterator[None]:
    """Run a model in evaluation mode with plain attention, and put both back afterwards.

    Fused attention can neither be differentiated twice nor mapped over samples.
    """
    fused = [block.attn.fused_attn for block in vit.blocks if block.attn is not None]
    vit.use_fused_attention(False)
    try:
        with eval_mode(vit):
            yield
    finally:
        attentions = [block.attn for block in vit.blocks if block.attn is not None]
        for attn, was_fused in zip(attentions, fused, strict=True):
            attn.fused_attn = was_fused


@contextmanager
def recorded(
    places: Mapping[str, nn.Module],
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Record what modules read and say during a forward pass; nothing is left on the model.

    Args:
        places: Name -> module. What it says takes a gradient, though all weights be frozen.

    Yields:
        Name -> what it reads, [B, N, in], detached; name -> what it says, [B, N, out].
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, place: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = arguments[0].detach()
            outputs[name] = output if output.requires_grad else output.requires_grad_()

        return place.register_forward_hook(hook)

    handles = [record(name, place) for name, place in places.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
