"""What every token method must do beyond the contract: compose, and run elsewhere."""

from __future__ import annotations

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

from pruners import Plan, PrunableViT, Step, cost_of, load_method, method_names
from pruners.export.onnx import agreement, export_program, write_onnx
from pruners.families.token import quarters
from tests.models import TINY, VARIANTS, images_for

METHODS = [name for name in method_names() if load_method(name).family == "token"]
LARGE = {"img_size": (48, 32), "depth": 4}  # 24 patches, 6 rows of 4


def token_step(method: str, vit: PrunableViT, share: float = 0.4) -> Step:
    pruner = load_method(method)
    return Step(pruner=pruner, thresholds=dict.fromkeys(pruner.sites(vit.shape()), share))


@torch.no_grad()
def spread_scores(vit: PrunableViT) -> None:
    """Untrained selectors score all tokens nearly alike, so that rounding would decide."""
    for block in vit.blocks:
        for parameter in block.front.parameters() if block.front is not None else ():
            parameter.add_(0.5 * torch.randn_like(parameter))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_all_token_methods_are_here() -> None:
    assert {"evit", "tome", "pitome", "mctf", "dynamic_vit", "spvit", "cait_tokens"} == set(METHODS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_really_gone(method: str, variant: str, tiny) -> None:
    vit = tiny(**{**LARGE, **VARIANTS[variant]})
    dense = cost_of(vit.shape())
    Plan(steps=(token_step(method, vit),)).apply(vit)
    seen: dict[str, list[int]] = {"attn": [], "mlp": []}
    for block in vit.blocks:
        for name, tokens in seen.items():
            branch = block.attn.qkv if name == "attn" else block.mlp.fc1
            branch.register_forward_hook(lambda m, i, o, t=tokens: t.append(i[0].shape[1]))
    for batch in (1, 3):
        seen["attn"].clear()
        seen["mlp"].clear()
        assert vit(images_for(vit, batch)).shape == (batch, 5)
        assert seen["attn"] == [block.tokens for block in vit.shape().blocks]
        assert seen["mlp"] == [block.mlp_tokens for block in vit.shape().blocks]
    assert seen["mlp"][-1] < 20
    assert cost_of(vit.shape()).macs < 0.85 * dense.macs


def test_evaluation_is_deterministic_and_each_image_is_on_its_own(method: str, tiny) -> None:
    vit = tiny(**LARGE)
    Plan(steps=(token_step(method, vit),)).apply(vit)
    spread_scores(vit)
    images = images_for(vit, 4)
    together = vit(images)
    assert torch.equal(vit(images), together)
    for image in range(4):
        torch.testing.assert_close(vit(images[image : image + 1])[0], together[image])


def test_behind_units_and_in_front_of_weights(method: str, tiny, batches, tmp_path) -> None:
    vit = tiny(**LARGE)
    batches = [(torch.randn(6, 3, 48, 32), labels) for _, labels in batches]
    grouped, magnitude = load_method("grouped", criterion="magnitude"), load_method("taylor")
    units = {
        "blocks.1.attn.head": 0.34,
        "blocks.2.mlp.neuron": 0.5,
        "blocks.3.attn.head": 1.0,
        "blocks.3.mlp.neuron": 0.2,
    }
    cut = tiny(**LARGE)
    grouped.cut(cut, grouped.score(cut, batches), units)
    plan = Plan(
        steps=(
            Step(pruner=grouped, thresholds=units),
            token_step(method, cut),
            Step(pruner=magnitude, thresholds={"blocks.2.mlp.fc1": 0.5, "blocks.1.attn.qkv": 0.3}),
        )
    )
    predicted = plan.shape(vit.shape())
    plan.apply(vit, batches)
    assert vit.shape() == predicted
    assert predicted.blocks[1].heads == 2
    assert predicted.blocks[3].heads == 0
    assert predicted.blocks[-1].mlp_tokens < 22
    again = Plan.from_json(plan.to_json())
    assert again.shape(tiny(**LARGE).shape()) == predicted
    vit.save(tmp_path)
    loaded, images = PrunableViT.load(tmp_path).eval(), images_for(vit)
    assert torch.equal(loaded(images), vit(images))


def test_a_distilled_model_keeps_both_its_tokens(method: str) -> None:
    torch.manual_seed(0)
    args = {**TINY, **LARGE}
    vit = PrunableViT(VisionTransformerDistilled(**args)).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    Plan(steps=(token_step(method, vit),)).apply(vit)
    tokens = vit.tokens(images_for(vit)).x
    # With no token of a block's own added, what stands in front is still the two prefix tokens.
    for block in vit.blocks:
        block.attn.proj.weight.data.zero_()
        block.attn.proj.bias.data.zero_()
        block.mlp.fc2.weight.data.zero_()
        block.mlp.fc2.bias.data.zero_()
    still = vit.tokens(images_for(vit)).x
    expected = vit.vit.norm(vit.embed(images_for(vit)))[:, :2]
    assert tokens.shape == still.shape
    torch.testing.assert_close(still[:, :2], expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_without_this_project(method: str, tiny, tmp_path) -> None:
    """torch.export and ONNX, with any number of images."""
    vit = tiny(**{**LARGE, "depth": 3, "reg_tokens": 1})
    Plan(steps=(token_step(method, vit),)).apply(vit)
    spread_scores(vit)
    program = export_program(vit).module()
    write_onnx(vit, tmp_path / "vit.onnx")
    for count in (1, 2, 5):
        images = images_for(vit, count)
        torch.testing.assert_close(program(images), vit(images), atol=1e-5, rtol=0)
        assert agreement(tmp_path / "vit.onnx", vit, images).difference <= 1e-5


def test_places_of_the_papers(tiny) -> None:
    assert quarters(tiny(depth=12).shape()) == [3, 6, 9]
    assert quarters(tiny(depth=6).shape()) == [1, 3, 4]
    assert quarters(tiny(depth=1).shape()) == [0]
