from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruners import Plan, PrunableViT, Step, load_method
from pruners.export.timm import why_not, write_timm
from pruners.model.surgery import keep_attention_writes, remove_attention, remove_mlp
from tests.models import TINY, VARIANTS, images_for

UNITS = {  # uneven sizes, and a block that is gone
    "blocks.0.attn.head": 0.34,
    "blocks.0.mlp.neuron": 0.29,
    "blocks.1.attn.head": 1.0,
    "blocks.1.mlp.neuron": 1.0,
    "blocks.2.mlp.neuron": 0.6,
}

ALONE = """
import runpy, sys
from pathlib import Path
sys.modules["pruners"] = sys.modules["search"] = None  # importing them fails
import torch
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    vit = runpy.run_path(str(folder / "load_timm.py"))["vit"]
    with torch.no_grad():
        save_file({"logits": vit(load_file(folder / "images")["images"])}, folder / "logits")
"""


def perturbed(vit: PrunableViT) -> PrunableViT:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


def cut(vit: PrunableViT, units: dict[str, float], kinds: tuple[str, ...]) -> PrunableViT:
    grouped = load_method("grouped", criterion="magnitude", units=kinds, compensate=False)
    masked = {"blocks.0.mlp.fc1": 0.5, "blocks.2.attn.qkv": 0.3}
    steps = (
        Step(pruner=grouped, thresholds=units),
        Step(pruner=load_method("magnitude"), thresholds=masked),
    )
    Plan(steps=steps).apply(vit)
    return vit


def models(tiny) -> dict[str, PrunableViT]:
    own = {name: cut(tiny(**args), UNITS, ("head", "neuron")) for name, args in VARIANTS.items()}
    named = {"img_size": 32, "depth": 3, "num_classes": 5}
    for name, more in (
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_little_patch16_reg4_gap_256", {"qk_norm": True}),
        ("vit_base_patch32_clip_quickgelu_224", {"embed_dim": 96, "num_heads": 4}),
    ):
        vit = PrunableViT.from_timm(name, pretrained=False, **named, **more)
        own[name] = cut(perturbed(vit), UNITS, ("head", "neuron"))
    # q, k and v of fewer dims: the softmax scale is that of the whole width.
    dims = {f"blocks.{i}.attn.{kind}": 0.5 for i in (0, 2) for kind in ("qk_dim", "v_dim")}
    own["dims"] = cut(tiny(), dims, ("qk_dim", "v_dim"))
    own["narrow"] = cut(tiny(qk_norm=True), {"width": 0.3}, ("width",))
    own["narrow_rms"] = cut(
        tiny(norm_layer="rmsnorm"), UNITS | {"width": 0.6}, ("head", "neuron", "width")
    )
    own["narrow_distilled"] = cut(
        perturbed(
            PrunableViT.from_timm("deit_tiny_distilled_patch16_224", pretrained=False, **named)
        ),
        UNITS | {"width": 0.4},
        ("head", "neuron", "width"),
    )
    own["empty"] = tiny()
    for block in own["empty"].blocks:
        remove_attention(block)
        remove_mlp(block)
    return own


@pytest.mark.slow
def test_loads_without_this_project(tiny, tmp_path: Path) -> None:
    written = models(tiny)
    for name, vit in written.items():
        assert why_not(vit) == ""
        write_timm(vit, tmp_path / name)
        save_file({"images": images_for(vit)}, tmp_path / name / "images")
    folders = [str(tmp_path / name) for name in written]
    command = [sys.executable, "-I", "-c", ALONE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for name, vit in written.items():
        logits = load_file(tmp_path / name / "logits")["logits"]
        expected = vit(images_for(vit))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
        assert expected.std() > 0.01


def test_masked_weights_are_zeros_and_gone_blocks_are_left_out(tiny, tmp_path: Path) -> None:
    vit = cut(tiny(), UNITS, ("head", "neuron"))
    write_timm(vit, tmp_path)
    state = load_file(tmp_path / "timm.safetensors")
    assert state["blocks.0.mlp.fc1.weight"].shape == (68, 24)
    assert (state["blocks.0.mlp.fc1.weight"] == 0.0).sum() == 68 * 24 // 2
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {"0", "1"}
    assert torch.equal(state["blocks.1.mlp.fc2.bias"], vit.blocks[2].mlp.fc2.bias)


@pytest.mark.parametrize(
    ("method", "thresholds", "reason"),
    [
        ("tome", {"blocks.1.token": 0.4}, "blocks.1 reduces the tokens"),
        ("grouped", {"blocks.2.attn.head": 1.0}, "blocks.2 has lost its attention alone"),
        ("grouped", {"blocks.0.mlp.neuron": 1.0}, "blocks.0 has lost its MLP alone"),
    ],
)
def test_why_not(method: str, thresholds: dict[str, float], reason: str, tiny, tmp_path) -> None:
    vit = tiny()
    options = {"criterion": "magnitude", "compensate": False} if method == "grouped" else {}
    step = Step(pruner=load_method(method, **options), thresholds=thresholds)
    Plan(steps=(step,)).apply(vit)
    assert why_not(vit).startswith(reason)
    with pytest.raises(ValueError, match=f"plain timm cannot express the model: {reason}"):
        write_timm(vit, tmp_path)
    assert not list(tmp_path.iterdir())


def test_why_not_widths_and_channels(tiny) -> None:
    vit = tiny()
    pruner = load_method("grouped", criterion="magnitude", units=("v_dim",), compensate=False)
    Plan(steps=(Step(pruner=pruner, thresholds={"blocks.1.attn.v_dim": 0.5}),)).apply(vit)
    assert "blocks.1 has q and k of width 8 but v of width 4" in why_not(vit)
    vit = tiny()
    keep_attention_writes(vit.blocks[2], torch.arange(3, 20))
    assert why_not(vit).startswith("blocks.2 writes to some residual channels only")
    vit = PrunableViT(type(vit.vit)(**TINY))
    assert why_not(vit).startswith("the model's architecture is unknown")
