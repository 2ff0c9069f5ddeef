from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from pruners import Plan, Step, load_method
from pruners.export.onnx import agreement, agreement_of, export_program, write_onnx, write_program
from tests.models import VARIANTS, cut, images_for


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pooled", "qk_norm", "grey_no_bias"])
def test_program_takes_any_number_of_images(variant: str, tiny, tmp_path) -> None:
    vit = cut(tiny(patch_size=4, **VARIANTS[variant]))
    write_program(vit, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 2, 7):
        images = images_for(vit, count)
        torch.testing.assert_close(program(images), vit(images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_onnx_file_is_one_and_says_what_it_takes(tiny, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    vit = cut(tiny(patch_size=4, reg_tokens=2, init_values=0.5))
    vit.mean, vit.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    write_onnx(vit, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()  # no path of this machine
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 24, 16])
    assert isinstance(given.shape[0], str)  # a name: any number
    assert (returned.name, returned.shape) == ("logits", [given.shape[0], 5])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(metadata["std"]) == [0.4, 0.5, 0.6]
    for count in (1, 2, 7):
        images = images_for(vit, count)
        (logits,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(logits, vit(images).detach().numpy(), atol=1e-5, rtol=0)
        assert agreement(tmp_path / "model.onnx", vit, images).difference <= 1e-5
    with torch.no_grad():
        vit.vit.head.bias[3] -= 0.25  # the file does not follow
    difference = agreement(tmp_path / "model.onnx", vit, images_for(vit)).difference
    assert difference == pytest.approx(0.25, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("args", [{"qk_norm": True}, {"norm_layer": "rmsnorm"}], ids=str)
def test_a_narrower_model_is_exported(args: dict, tiny, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    vit = tiny(patch_size=4, **args)
    narrow = load_method(
        "grouped", criterion="magnitude", units=("head", "width"), compensate=False
    )
    shares = {"width": 0.3, "blocks.1.attn.head": 0.4}
    Plan(
        steps=(
            Step(pruner=narrow, thresholds=shares),
            Step(pruner=load_method("tome"), thresholds={"blocks.0.token": 0.3}),
        )
    ).apply(vit)
    assert vit.shape().dim == 17
    write_onnx(vit, tmp_path / "model.onnx")
    assert agreement(tmp_path / "model.onnx", vit, images_for(vit)).difference <= 1e-5


@pytest.mark.slow
def test_model_stays_as_it_is(tiny) -> None:
    vit = tiny(drop_path_rate=0.5).train()
    vit.use_fused_attention(False)
    program = export_program(vit).module()
    assert vit.training
    assert not any(block.attn.fused_attn for block in vit.blocks)
    assert all(parameter.requires_grad for parameter in vit.parameters())
    images = images_for(vit)
    torch.testing.assert_close(program(images), vit.eval()(images), atol=1e-5, rtol=0)


def test_missing_package_is_named(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"^onnxscript is missing; .*: pip install onnxscript$"):
        write_onnx(tiny(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_model_too_large_for_one_file_is_refused(tiny, tmp_path) -> None:
    vit = tiny()
    with torch.device("meta"):
        vit.vit.head = torch.nn.Linear(30_000, 20_000)
    with pytest.raises(ValueError, match=r"model has 2\.40 GB .* less than 2\.15 GB"):
        write_onnx(vit, tmp_path / "model.onnx")


def test_what_disagrees_is_said() -> None:
    near = torch.full((20,), 1e-5)
    assert agreement_of(near, chosen=False).reason == ""
    turned = near.clone()
    turned[[3, 11]] = 0.5
    assert agreement_of(turned, chosen=True).reason == ""  # two of twenty chose another token
    assert agreement_of(turned, chosen=False).reason == (
        "its logits in onnxruntime are 5.0e-01 from PyTorch's at most, and more than 0.0001 on 2 "
        "of 20 images"
    )
    turned[5] = 0.002
    reason = agreement_of(turned, chosen=True).reason
    assert reason.endswith("on 3 of 20 images; at most 2 may")
    near[7] = torch.nan
    assert "on 1 of 20 images" in agreement_of(near, chosen=False).reason
