"""2:4 weights as `torch.sparse.to_sparse_semi_structured` takes them, for GPUs that gain from them.

Two of each four consecutive inputs are zero. A layer's sizes must also be multiples of what the
kernels work on; where cut units leave others, cut in multiples (option `multiple` of the method).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pruners.model.vit import ViT

DTYPES = (torch.float16, torch.bfloat16)

BACKENDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"cusparselt": (16, 16), "cutlass": (32, 64)}
)
"""What outputs and inputs of a layer must be multiples of, in `DTYPES`; PyTorch's default first."""

_KINDS: Mapping[str, type[SparseSemiStructuredTensor]] = MappingProxyType(
    {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }
)


def is_two_of_four(weight: Tensor) -> bool:
    """Say whether, of each four consecutive inputs of a weight [out, in], two at least are zero."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(dim=2) <= 2).all())


def why_not(weight: Tensor, backend: str) -> str:
    """Return, in one line, why a backend does not take a weight [out, in]; empty if it does."""
    outputs, inputs = weight.shape
    rows, columns = BACKENDS[backend]
    if not is_two_of_four(weight):
        return "its zeros are not 2:4 along the inputs"
    if outputs % rows or inputs % columns:
        return (
            f"it has {outputs} outputs and {inputs} inputs; "
            f"{backend} needs multiples of {rows} and {columns}"
        )
    return ""


def semi_structured_layers(vit: ViT) -> dict[str, dict[str, str]]:
    """Return, for each linear layer of the blocks, backend -> why it does not take it, or ""."""
    return {
        site: {backend: why_not(layer.weight, backend) for backend in BACKENDS}
        for site, layer in vit.linears()
    }


def to_semi_structured(vit: ViT, dtype: torch.dtype) -> list[str]:
    """Let a model on a GPU run its 2:4 layers on sparse tensor cores, in place.

    The whole model computes in `dtype` afterwards, is for inference only, and cannot be saved.

    Args:
        vit: The model.
        dtype: float16 or bfloat16.

    Returns:
        The layers whose weights are sparse tensors now.

    Raises:
        ValueError: If the model is not on a GPU, or no layer of it is taken; nothing is changed.
    """
    device = next(vit.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"vit is on {device}; 2:4 kernels need a CUDA GPU: give vit.cuda()")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; give torch.float16 or torch.bfloat16")
    backend = "cusparselt" if torch.backends.cusparselt.is_available() else "cutlass"
    reasons = {site: why_not(layer.weight, backend) for site, layer in vit.linears()}
    taken = [site for site, reason in reasons.items() if not reason]
    if not taken:
        site, reason = next(iter(reasons.items()), ("blocks", "there are none"))
        raise ValueError(f"no layer is taken; {site}: {reason}")
    vit.to(dtype).eval().requires_grad_(False)
    layers = dict(vit.linears())
    for site in taken:
        # As to_sparse_semi_structured, which fails where there is no cuSPARSELt.
        sparse = _KINDS[backend].from_dense(layers[site].weight.detach().contiguous())
        layers[site].weight = nn.Parameter(sparse, requires_grad=False)
    return taken
