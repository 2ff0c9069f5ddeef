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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from pruners.model.files import replace_file
from pruners.model.vit import ViT

INPUT, OUTPUT = "images", "logits"
"""Names of an ONNX file's input and output."""

MOST_BYTES = 2**31
"""What a protobuf, and so an ONNX file without others beside it, holds at most."""

TOLERANCE = 1e-4
"""Largest difference of a logit between onnxruntime and PyTorch."""

MOST_TURNED = 0.1
"""Share of the images that may differ by more where tokens are chosen image by image: of two that
score alike, one runtime may choose the other."""

_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # names the paths of this machine, node by node


def export_program(vit: ViT) -> ExportedProgram:
    """Return the model as a program of `torch.export`, for any number of images."""
    vit = _copy(vit)
    vit.use_fused_attention(True)
    return _traced(vit)


def write_program(vit: ViT, path: str | Path) -> None:
    """Write a file that `torch.export.load(path).module()` opens, with torch alone.

    torch may unpickle what it finds in such a file: open only those you trust.
    """
    content = io.BytesIO()
    torch.export.save(export_program(vit), content)
    replace_file(Path(path), lambda temporary: temporary.write_bytes(content.getbuffer()))


def write_onnx(vit: ViT, path: str | Path) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an ONNX file's logits in onnxruntime are from PyTorch's.

    Attributes:
        difference: The largest absolute difference; NaN if a logit is not a number.
        images: Images on which they were compared.
        within: Those on which no logit differs by more than `TOLERANCE`.
        chosen: Whether the model chooses tokens image by image.
    """

    difference: float
    images: int
    within: int
    chosen: bool

    @property
    def reason(self) -> str:
        """Why the file does not compute what the model does; empty if it does."""
        turned, allowed = self.images - self.within, int(MOST_TURNED * self.images)
        if turned <= (allowed if self.chosen else 0):
            return ""
        at_most = f"; at most {allowed} may" if self.chosen else ""
        return (
            f"its logits in onnxruntime are {self.difference:.1e} from PyTorch's at most, and more "
            f"than {TOLERANCE:g} on {turned} of {self.images} images{at_most}"
        )


def agreement(path: str | Path, vit: ViT, images: Tensor) -> Agreement:
    """Compare an ONNX file's logits with those of the model that it was written of.

    Args:
        path: A file that `write_onnx` wrote of this model.
        vit: The model, in evaluation mode.
        images: [B, channels, height, width], normalised.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    (logits,) = onnx_call(path, images)()
    with torch.no_grad():
        expected = vit(images).cpu()
    differences = (torch.from_numpy(logits) - expected).abs().amax(dim=1)
    return agreement_of(differences, chosen=vit.shape().reduced)


def agreement_of(differences: Tensor, *, chosen: bool) -> Agreement:
    """Return what the differences [B] of each image's logits come to."""
    return Agreement(
        difference=float(differences.max()),
        images=len(differences),
        within=int((differences <= TOLERANCE).sum()),  # NaN is not
        chosen=chosen,
    )


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
    # Else its threads spin on for a while, which slows down whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {INPUT: images.cpu().numpy()}
    return lambda: session.run([OUTPUT], given)


def _copy(vit: ViT) -> ViT:
    return copy.deepcopy(vit).cpu().float().eval().requires_grad_(False)


def _traced(vit: ViT) -> ExportedProgram:
    shape = vit.shape()
    example = torch.zeros(2, shape.channels, *shape.image)  # 1 would be taken for a constant
    return torch.export.export(vit, (example,), dynamic_shapes=({0: Dim("batch")},))


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing; ONNX needs it: pip install {package}") from error
