from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from pruners import PrunableViT
from tests.models import TINY, VARIANTS, images_for

TIMM_MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 48},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_classes": 7},
    "vit_medium_patch16_gap_256": {"img_size": 64},
    "vit_base_patch32_clip_224": {"img_size": 96},
}


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_untouched_model_equals_timm_bit_for_bit(name: str, fused: bool) -> None:
    model = timm.create_model(name, pretrained=False, **TIMM_MODELS[name]).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    vit = PrunableViT(copy.deepcopy(model))
    images = images_for(vit)
    with torch.no_grad():
        assert torch.equal(vit(images), model(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_untouched_variant_equals_timm_bit_for_bit_in_training_mode(variant: str) -> None:
    args = {
        **TINY,
        **VARIANTS[variant],
        "drop_path_rate": 0.2,
        "attn_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
    }
    model = VisionTransformer(**args).train()
    vit = PrunableViT(copy.deepcopy(model)).train()
    images = images_for(vit)
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    assert torch.equal(vit(images), expected)


def test_gradients_equal_timm() -> None:
    model = VisionTransformer(**TINY)
    vit = PrunableViT(copy.deepcopy(model))
    images = images_for(vit)
    model(images).square().sum().backward()
    vit(images).square().sum().backward()
    for (name, ours), theirs in zip(vit.vit.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_parameter_names_stay_timms() -> None:
    model = VisionTransformer(**TINY)
    names = set(model.state_dict())
    assert set(PrunableViT(model).vit.state_dict()) == names


@pytest.mark.parametrize(
    ("name", "args", "module"),
    [
        (
            "vit_giant_patch14_dinov2",
            {"depth": 1, "img_size": 28, "num_classes": 3},
            "blocks.0.mlp",
        ),
        ("vit_base_patch16_siglip_224", {"depth": 1}, "attn_pool"),
        ("vit_base_patch16_rpn_224", {"depth": 1}, "blocks.0"),
        ("resnet18", {}, "ResNet"),
    ],
)
def test_unsupported_models_are_refused_by_the_modules_name(
    name: str, args: dict, module: str
) -> None:
    with pytest.raises(ValueError, match=module):
        PrunableViT(timm.create_model(name, pretrained=False, **args))


@pytest.mark.parametrize(
    ("args", "module"),
    [
        ({"scale_attn_norm": True}, r"blocks\.0\.attn\.norm"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm"),
        ({"class_token": False, "global_pool": ""}, "global_pool"),
    ],
)
def test_unsupported_parts_are_refused_by_name(args: dict, module: str) -> None:
    with pytest.raises(ValueError, match=module):
        PrunableViT(VisionTransformer(**{**TINY, **args}))


def test_state_dict_that_does_not_fit_is_named() -> None:
    state = VisionTransformer(**TINY).state_dict()
    with pytest.raises(ValueError, match=r"lacks head\.bias"):
        PrunableViT.from_state_dict({k: v for k, v in state.items() if k != "head.bias"}, **TINY)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(5, 24\).*needs \(7, 24\)"):
        PrunableViT.from_state_dict(state, **{**TINY, "num_classes": 7})


def test_unknown_names_and_arguments_say_what_exists() -> None:
    with pytest.raises(ValueError, match=r"vit_tinny.*names like it: vit_tin"):
        PrunableViT.from_timm("vit_tinny_patch16", pretrained=False)
    with pytest.raises(ValueError, match=r"\['widht'\] are unknown"):
        PrunableViT.from_state_dict({}, widht=3)


def test_distilled_model_has_two_classifiers_and_prefix_tokens() -> None:
    vit = PrunableViT.from_timm(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, depth=1
    )
    shape = vit.shape()
    assert (shape.classifiers, shape.prefix_tokens, shape.blocks[0].tokens) == (2, 2, 6)
