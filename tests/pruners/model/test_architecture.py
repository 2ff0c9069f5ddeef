from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pruners import PrunableViT
from pruners.model.architecture import MOST_PER_STORED, build, check_size
from tests.models import TINY

OUTSIDE = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device")
"""Arguments with which timm reads, fetches or unpickles a file, or builds elsewhere."""


@pytest.mark.parametrize("name", [None, "vit_tiny_patch16_224"])
@pytest.mark.parametrize("key", OUTSIDE)
def test_arguments_that_lead_outside_are_unknown(key: str, name: str | None) -> None:
    with pytest.raises(ValueError, match=rf"model args \['{key}'\] are unknown"):
        build(name, {key: "/tmp/x.pth"})


@pytest.mark.parametrize("name", ["../vit_tiny_patch16_224", "hf-hub:a/b", "local-dir:/tmp", True])
def test_names_are_those_of_timm(name: object) -> None:
    with pytest.raises(ValueError, match="is unknown to timm"):
        build(name, {})  # type: ignore[arg-type]


def test_what_follows_a_name_is_no_path() -> None:
    with pytest.raises(ValueError, match="cannot be built"):
        build("vit_tiny_patch16_224.../../x", {})


@pytest.mark.parametrize(
    "args",
    [
        {"num_heads": 5},
        {"patch_size": 0},
        {"drop_rate": 7},
        {"norm_layer": "x"},
        {"act_layer": "x"},
    ],
)
def test_what_timm_cannot_build_is_named(args: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"VisionTransformer with args .* cannot be built"
    ) as error:
        build(None, {**TINY, **args})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("embed_dim", 10**9), ("depth", 10**9), ("num_classes", 10**9), ("mlp_ratio", 1e9)],
)
def test_an_absurd_model_is_refused_before_it_is_built(key: str, value: float, tiny, tmp_path):
    state = {name: t.contiguous() for name, t in tiny().vit.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", {"arch": json.dumps({**TINY, key: value})})
    tiny().save(tmp_path)
    description = json.loads((tmp_path / "shape.json").read_text())
    description["arch"]["args"][key] = value
    (tmp_path / "shape.json").write_text(json.dumps(description))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"give the args of the stored weights.*a\.safetensors"):
        PrunableViT.from_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"shape\.json: .*give the args of the stored weights"):
        PrunableViT.load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 0),
        ("depth", True),
        ("embed_dim", 24.0),
        ("img_size", []),
        ("img_size", [1, 2, 3]),
        ("patch_size", -8),
        ("mlp_ratio", float("nan")),
        ("num_heads", "3"),
    ],
)
def test_sizes_are_sizes(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"model args have {key} = .*; give a size"):
        check_size(None, {**TINY, key: value}, most=10**9)


def test_a_size_is_about_the_number_of_parameters() -> None:
    parameters = sum(p.numel() for p in VisionTransformer(**TINY).parameters())
    check_size(None, TINY, most=int(1.1 * parameters))
    with pytest.raises(ValueError, match="give the args of the stored weights"):
        check_size(None, TINY, most=int(0.9 * parameters))


def test_a_model_whose_blocks_are_all_cut_away_is_not_absurd() -> None:
    with torch.device("meta"):
        vit = VisionTransformer()  # ViT-B/16
    whole = sum(p.numel() for p in vit.parameters())
    outer = sum(p.numel() for n, p in vit.named_parameters() if not n.startswith("blocks."))
    assert outer < 0.02 * whole  # what such a model stores
    check_size(None, {}, most=MOST_PER_STORED * outer)
    with pytest.raises(ValueError, match="give the args of the stored weights"):
        check_size(None, {}, most=whole // 2)  # it is counted
