from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import Plan, PrunableViT, Step, cost_of, load_method
from pruners.families.learned import Learned
from tests.models import TINY, images_for


def mixed_plan(units: float, tokens: float, weights: float) -> Plan:
    grouped = load_method("grouped", criterion="magnitude", compensate=False)
    evit, magnitude = load_method("evit"), load_method("magnitude")
    shape = PrunableViT.from_state_dict(_STATE, **TINY).shape()
    steps, shares = [], ((grouped, units), (evit, tokens), (magnitude, weights))
    for pruner, share in shares:
        thresholds = dict.fromkeys(pruner.sites(shape), share)
        shape = pruner.shrink(shape, thresholds)
        steps.append(Step(pruner=pruner, thresholds=thresholds))
    return Plan(steps=tuple(steps))


@settings(max_examples=40, deadline=None)
@given(units=st.floats(0, 0.95), tokens=st.floats(0, 0.95), weights=st.floats(0, 0.95))
def test_any_plan_gives_the_shape_it_predicts(units: float, tokens: float, weights: float) -> None:
    vit = PrunableViT.from_state_dict(_STATE, **TINY).eval()
    plan = mixed_plan(units, tokens, weights)
    predicted = plan.shape(vit.shape())
    plan.apply(vit)
    assert vit.shape() == predicted
    assert torch.isfinite(vit(images_for(vit))).all()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


BEHIND = {"evit": {}, "tome": {}, "cait_tokens": {}, "dynamic_vit": {}, "spvit": {}}
BEHIND |= {"magnitude": {"pattern": "2:4"}, "cap": {}, "fast_cap": {}, "woodfisher": {}}


@pytest.mark.parametrize("name", BEHIND)
def test_methods_work_behind_a_narrower_model(name: str, tiny, batches, tmp_path) -> None:
    vit, method = tiny(patch_size=4), load_method(name, **BEHIND[name])
    narrow = load_method("grouped", units=("width",), multiple=4)
    shape = narrow.shrink(vit.shape(), {"width": 0.5})
    shares = dict.fromkeys(method.sites(shape), 0.5)
    steps = (Step(pruner=narrow, thresholds={"width": 0.5}), Step(pruner=method, thresholds=shares))
    predicted = Plan(steps=steps).shape(vit.shape())
    Plan(steps=steps).apply(vit, batches)
    assert vit.shape() == predicted
    assert predicted.dim == 12
    assert cost_of(predicted).params == sum(parameter.numel() for parameter in vit.parameters())
    vit.save(tmp_path)
    images = images_for(vit)
    with torch.no_grad():
        assert torch.equal(PrunableViT.load(tmp_path).eval()(images), vit.eval()(images))


def test_each_family_really_acts(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    seen: list[int] = []
    vit.blocks[-1].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1])
    )
    vit(images_for(vit))
    plan = Plan(
        steps=(
            Step(
                pruner=load_method("grouped", criterion="magnitude", compensate=False),
                thresholds={"blocks.1.mlp.neuron": 0.5},
            ),
            Step(pruner=load_method("evit"), thresholds={"blocks.1.token": 0.5}),
            Step(pruner=load_method("magnitude"), thresholds={"blocks.1.mlp.fc1": 0.5}),
        )
    )
    plan.apply(vit)
    vit(images_for(vit))
    assert seen == [25, 14]  # fewer tokens flow
    fc1 = vit.blocks[1].mlp.fc1.weight
    assert tuple(fc1.shape) == (48, 24)  # the matrix is smaller
    assert int((fc1 == 0).sum()) == 48 * 24 // 2  # and half of what is left is zero


def test_another_order_is_refused() -> None:
    evit, grouped, magnitude = (load_method(n) for n in ("evit", "grouped", "magnitude"))
    Plan(
        steps=(
            Step(pruner=grouped),
            Step(pruner=grouped),
            Step(pruner=evit),
            Step(pruner=magnitude),
        )
    )
    with pytest.raises(
        ValueError, match=r"evit \(token\) -> grouped \(unit\); give them in the order unit"
    ):
        Plan(steps=(Step(pruner=evit), Step(pruner=grouped)))
    with pytest.raises(ValueError, match="2 token methods"):
        Plan(steps=(Step(pruner=evit), Step(pruner=evit)))


def test_units_and_tokens_of_a_masked_model_are_refused(tiny) -> None:
    vit = tiny()
    Plan(
        steps=(Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1": 0.5}),)
    ).apply(vit)
    for method, site in (("grouped", "blocks.0.attn.head"), ("evit", "blocks.0.token")):
        with pytest.raises(ValueError, match="masked weights; cut them first"):
            Plan(steps=(Step(pruner=load_method(method), thresholds={site: 0.5}),)).shape(
                vit.shape()
            )


def test_what_was_learned_is_used_instead_of_learning_again(tiny) -> None:
    vit = tiny()
    site = "blocks.0.mlp.neuron"
    method = load_method("x_pruner", compensate=False)
    step = Step(pruner=method, thresholds={site: 0.5})
    weights = {name: 2.0 * tensor for name, tensor in vit.vit.state_dict().items()}
    learned = Learned(scores={site: torch.arange(96.0).flip(0)}, weights=weights)
    expected = 2.0 * vit.blocks[0].mlp.fc1.weight[:48]
    magnitude = Step(pruner=load_method("magnitude"), thresholds={"blocks.1.mlp.fc1": 0.5})
    Plan(steps=(step, magnitude)).apply(vit, learned=learned)
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, expected)
    assert "blocks.1.mlp.fc1" in vit.masks


def test_known_scores_are_used_instead_of_scoring_again(tiny) -> None:
    vit, site = tiny(), "blocks.0.mlp.neuron"
    learned = Learned(scores={site: torch.arange(96.0).flip(0)})
    expected = vit.blocks[0].mlp.fc1.weight[:48].clone()
    grouped = load_method("grouped", compensate=False)
    Plan(steps=(Step(pruner=grouped, thresholds={site: 0.5}),)).apply(vit, learned=learned)
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, expected)


def test_later_steps_score_what_is_left(tiny, batches) -> None:
    # Taylor scores of the weights after surgery have the smaller shape.
    vit = tiny()
    Plan(
        steps=(
            Step(pruner=load_method("grouped"), thresholds={"blocks.0.mlp.neuron": 0.5}),
            Step(pruner=load_method("taylor"), thresholds={"blocks.0.mlp.fc1": 0.5}),
        )
    ).apply(vit, batches)
    assert vit.shape().nonzero == {"blocks.0.mlp.fc1": 48 * 24 // 2}


def test_the_description_is_one_line_with_means_and_ranges() -> None:
    thresholds = {
        "blocks.0.attn.head": 0.25,
        "blocks.0.mlp.neuron": 0.1,
        "blocks.1.mlp.neuron": 0.5,
        "width": 0.2,
    }
    grouped = load_method("grouped", units=("head", "neuron", "width"))
    plan = Plan(
        steps=(
            Step(pruner=grouped, thresholds=thresholds),
            Step(pruner=load_method("evit"), thresholds={"blocks.0.token": 0.0}),
            Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1": 0.5}),
        )
    )
    assert (
        plan.describe()
        == "grouped: heads -25 %, neurons -30 % (10 to 50), width -20 %; magnitude: weights -50 %"
    )
    assert Plan().describe() == "dense"


def test_a_broken_plan_file_is_named() -> None:
    with pytest.raises(ValueError, match="plan lacks 'steps'"):
        Plan.from_json({})
    with pytest.raises(
        ValueError, match="method 'magnitud' does not exist; did you mean 'magnitude'"
    ):
        Plan.from_json({"steps": [{"method": "magnitud", "options": {}, "thresholds": {}}]})
    for thresholds in ([], {"blocks.0.token": "x"}, {"blocks.0.token": True}):
        with pytest.raises(ValueError, match=r"thresholds of evit are .*; give shares"):
            Plan.from_json({"steps": [{"method": "evit", "options": {}, "thresholds": thresholds}]})
    with pytest.raises(ValueError, match="plan lacks"):
        Plan.from_json({"steps": [{"method": "evit", "options": [1], "thresholds": {}}]})


def test_a_plan_of_zeros_costs_what_dense_costs(tiny) -> None:
    shape = tiny().shape()
    plan = Plan(
        steps=(Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1": 0.0}),)
    )
    assert cost_of(plan.shape(shape)) == cost_of(shape)


def _state() -> dict[str, torch.Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(4)
    return VisionTransformer(**TINY).state_dict()


_STATE = _state()


def test_a_stored_plan_gives_the_same_model_again(tiny, batches) -> None:
    plan = mixed_plan(0.4, 0.3, 0.5)
    first, second, images = tiny(), tiny(), images_for(tiny())
    plan.apply(first, batches)
    Plan.from_json(json.loads(json.dumps(plan.to_json()))).apply(second, batches)
    assert second.shape() == first.shape() != tiny().shape()
    assert torch.equal(second(images), first(images))
