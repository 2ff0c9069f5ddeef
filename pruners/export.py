"""Models that run without this project: programs of `torch.export` and ONNX files.

Both take normalised images [B, channels, height, width] in float32, any number B of them, and
return logits [B, classes], on the CPU and in evaluation mode, whatever the model is in now.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from pruners.checkpoint import replace_file
from pruners.vit import PrunableViT

INPUT, OUTPUT = "images", "logits"
"""Names of an ONNX file's input and output."""

MOST_BYTES = 2**31
"""What a protobuf, and so an ONNX file without others beside it, holds at most."""

_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # names the paths of this machine, node by node


def export_program(vit: PrunableViT) -> ExportedProgram:
    """Return the model as a program of `torch.export`, for any number of images."""
    vit = _copy(vit)
    vit.use_fused_attention(True)
    return _traced(vit)


def write_program(vit: PrunableViT, path: str | Path) -> None:
    """Write a file that `torch.export.load(path).module()` opens, with torch alone.

    torch may unpickle what it finds in such a file: open only those you trust.
    """
    content = io.BytesIO()
    torch.export.save(export_program(vit), content)
    replace_file(Path(path), lambda temporary: temporary.write_bytes(content.getbuffer()))


def write_onnx(vit: PrunableViT, path: str | Path) -> None:
    """Write one ONNX file with the input "images" and the output "logits".

    Its metadata hold the `mean` and `std` that images are normalised by, as JSON, if known.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the weights are too large for one file.
    """
    for package in ("onnx", "onnxscript"):
        _imported(package)
    size = sum(4 * tensor.numel() for tensor in vit.state_dict().values())
    if size >= MOST_BYTES:
        raise ValueError(
            f"model has {size / 1e9:.2f} GB of weights; one ONNX file holds less than 2.15 GB"
        )
    plain = _copy(vit)
    plain.use_fused_attention(False)  # a third fewer nodes, and onnxruntime fuses these itself
    exported = torch.onnx.export(
        _traced(plain),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    for node in exported.model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
    statistics = {"mean": vit.mean, "std": vit.std}
    exported.model.metadata_props.update(
        {key: json.dumps(values) for key, values in statistics.items() if values is not None}
    )
    replace_file(Path(path), lambda temporary: exported.save(temporary, external_data=False))


def onnx_difference(path: str | Path, vit: PrunableViT, images: Tensor) -> float:
    """Return the largest absolute difference of logits between onnxruntime and PyTorch.

    Args:
        path: A file that `write_onnx` wrote of this model.
        vit: The model, in evaluation mode.
        images: [B, channels, height, width], normalised.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    return float(logit_differences(path, vit, images).max())


def logit_differences(path: str | Path, vit: PrunableViT, images: Tensor) -> Tensor:
    """Return, for each image [B], what `onnx_difference` returns for all."""
    (logits,) = onnx_call(path, images)()
    with torch.no_grad():
        expected = vit(images).cpu()
    return (torch.from_numpy(logits) - expected).abs().amax(dim=1)


def onnx_call(path: str | Path, images: Tensor) -> Callable[[], list[Any]]:
    """Return what runs an ONNX file in onnxruntime, on the CPU, with as many threads as PyTorch.

    Args:
        path: A file that `write_onnx` wrote.
        images: [B, channels, height, width], normalised.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    onnxruntime = _imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {INPUT: images.cpu().numpy()}
    return lambda: session.run([OUTPUT], given)


def _copy(vit: PrunableViT) -> PrunableViT:
    return copy.deepcopy(vit).cpu().float().eval().requires_grad_(False)


def _traced(vit: PrunableViT) -> ExportedProgram:
    shape = vit.shape()
    example = torch.zeros(2, shape.channels, *shape.image)  # 1 would be taken for a constant
    return torch.export.export(vit, (example,), dynamic_shapes=({0: Dim("batch")},))


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing; ONNX needs it: pip install {package}") from error
