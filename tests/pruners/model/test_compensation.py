from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pruners import Plan, PrunableViT, Step, load_method
from pruners.model.compensation import compensate
from pruners.model.surgery import keep_neurons, remove_attention, remove_mlp
from pruners.model.uncut import Uncut
from pruners.model.width import channel_slices, keep_width
from tests.models import VARIANTS, images_for

KINDS = [
    ("head", "neuron"),
    ("qk_dim", "v_dim", "neuron"),
    ("head", "qk_dim", "v_dim"),
]


def calibration(
    vit: PrunableViT, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    images = images_for(vit, 48).to(dtype)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(20)]


def same_model(vit: PrunableViT) -> PrunableViT:
    return copy.deepcopy(vit)


def cut_and_uncut(vit: PrunableViT, units: tuple[str, ...], share: float) -> tuple:
    method = load_method("grouped", criterion="magnitude", units=units)
    scores = method.score(vit, [])
    before = same_model(vit)
    shares = dict.fromkeys(method.sites(vit.shape()), share)
    return method.cut_scored(vit, [], scores, shares), before


def output_error(vit: PrunableViT, whole: PrunableViT, images: Tensor) -> float:
    with torch.no_grad():
        return (vit.tokens(images).x - whole.tokens(images).x).square().mean().item()


@pytest.mark.parametrize("units", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stays_comes_closer_to_the_uncut_model(variant: str, units: tuple, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    if variant == "qk_norm":
        units = tuple(kind for kind in units if kind != "qk_dim")
    uncut, whole = cut_and_uncut(vit, units, 0.4)
    batches, names = calibration(vit), set(vit.state_dict())
    masked = output_error(vit, whole, batches[0][0])
    compensate(vit, uncut, batches)
    assert output_error(vit, whole, batches[0][0]) < 0.8 * masked
    assert set(vit.state_dict()) == names
    assert torch.equal(uncut.vit.vit.head.weight, whole.vit.head.weight)


def test_it_is_exact_where_neurons_that_went_follow_from_those_that_stay(tiny) -> None:
    # Neurons that say the same, up to a factor in fc2, and constant ones.
    vit = tiny().double()
    mlp = vit.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight[48:90] = mlp.fc1.weight[:42]
        mlp.fc1.bias[48:90] = mlp.fc1.bias[:42]
        mlp.fc1.weight[90:] = 0.0
    whole, batches = same_model(vit), calibration(vit, torch.float64)
    uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
    keep_neurons(mlp, torch.arange(48))
    assert output_error(vit, whole, batches[0][0]) > 1e-3
    compensate(vit, uncut, batches, damping=1e-10)
    fresh = torch.randn(4, 3, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(vit(fresh), whole(fresh), atol=1e-5)


def test_the_first_layer_is_the_closed_form(tiny) -> None:
    # W'_K = W_K + W_R S_RK (S_KK + lambda I)^-1, and the bias takes the mean.
    vit = tiny().double()
    batches = calibration(vit, torch.float64)
    block, damping = vit.blocks[0], 1e-3
    with torch.no_grad():
        tokens = torch.cat([vit.embed(images).flatten(0, 1) for images, _ in batches])
        tokens = tokens.view(len(tokens) // 7, 7, -1)
        x = tokens + block.attn(block.norm1(tokens)).output
        h = block.mlp.act(block.mlp.fc1(block.norm2(x))).flatten(0, 1)
    kept = torch.arange(0, 96, 2)
    gone, weight, bias = kept + 1, block.mlp.fc2.weight.clone(), block.mlp.fc2.bias.clone()
    uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
    keep_neurons(block.mlp, kept)
    compensate(vit, uncut, batches, damping=damping)
    s = torch.cov(h.T, correction=0)
    damped = s[kept][:, kept] + damping * s[kept, kept].mean() * torch.eye(48, dtype=h.dtype)
    a = s[gone][:, kept] @ torch.linalg.inv(damped)
    wanted = weight[:, kept] + weight[:, gone] @ a
    mean = h.mean(0)
    assert torch.allclose(block.mlp.fc2.weight, wanted, atol=1e-7)
    wanted = bias + weight[:, gone] @ (mean[gone] - a @ mean[kept])
    assert torch.allclose(block.mlp.fc2.bias, wanted, atol=1e-7)


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_the_layer_never_errs_more_than_masked(damping: float, tiny) -> None:
    vit = tiny(depth=1)
    uncut, whole = cut_and_uncut(vit, ("neuron",), 0.5)
    (images,) = [torch.cat([images for images, _ in calibration(vit)])]
    masked = output_error_before_norm(vit, whole, images)
    compensate(vit, uncut, [(images, torch.zeros(48))], damping=damping)
    assert output_error_before_norm(vit, whole, images) <= masked


def output_error_before_norm(vit: PrunableViT, whole: PrunableViT, images: Tensor) -> float:
    return (before_last_norm(vit, images) - before_last_norm(whole, images)).square().mean().item()


@torch.no_grad()
def before_last_norm(vit: PrunableViT, images: Tensor) -> Tensor:
    model = same_model(vit)
    model.vit.norm = torch.nn.Identity()
    return model.tokens(images).x


def test_the_order_of_units_does_not_matter(tiny) -> None:
    outputs = []
    for order in (torch.arange(48), torch.randperm(48)):
        vit = tiny().double()
        uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
        keep_neurons(vit.blocks[0].mlp, order)
        compensate(vit, uncut, calibration(vit, torch.float64))
        with torch.no_grad():
            outputs.append(vit(images_for(vit).double()))
    assert torch.allclose(*outputs, atol=1e-9)


def test_where_nothing_is_cut_nothing_changes(tiny) -> None:
    vit = tiny()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
    keep_neurons(vit.blocks[2].mlp, torch.arange(48))
    compensate(vit, uncut, calibration(vit))
    changed = {n for n, value in vit.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {
        f"vit.blocks.2.mlp.{n}" for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }
    assert torch.equal(vit.blocks[2].mlp.fc1.weight, before["vit.blocks.2.mlp.fc1.weight"][:48])


def test_a_whole_branch_leaves_its_mean(tiny) -> None:
    for remove in (remove_attention, remove_mlp):
        vit = tiny(depth=2)
        whole, batches = same_model(vit), calibration(vit)
        uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
        remove(vit.blocks[1])
        masked = output_error(vit, whole, batches[0][0])
        compensate(vit, uncut, batches)
        assert output_error(vit, whole, batches[0][0]) < masked
    # Both branches of the last block: nothing is left behind that could make up for them.
    vit = tiny(depth=2)
    uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
    before = vit.blocks[0].mlp.fc2.bias.clone()
    remove_attention(vit.blocks[1])
    remove_mlp(vit.blocks[1])
    compensate(vit, uncut, calibration(vit))
    assert torch.equal(vit.blocks[0].mlp.fc2.bias, before)


def test_the_mean_of_a_branch_goes_into_the_layer_before_it(tiny) -> None:
    vit = tiny(depth=2, init_values=0.3)
    whole, batches = same_model(vit), calibration(vit)
    uncut = Uncut.of(vit, lambda marks: None, narrows_queries=False)
    before = vit.blocks[0].mlp.fc2.bias.clone()
    remove_attention(vit.blocks[1])
    compensate(vit, uncut, batches)
    block = whole.blocks[1]
    with torch.no_grad():
        streams = [
            whole.blocks[0].feed(whole.blocks[0].attend(t)).x for t in embedded(whole, batches)
        ]
        written = torch.cat([block.ls1(block.attn(block.norm1(x)).output) for x in streams])
    gamma = whole.blocks[0].ls2.gamma
    assert torch.allclose(
        vit.blocks[0].mlp.fc2.bias, before + written.mean((0, 1)) / gamma, atol=1e-5
    )


def embedded(vit: PrunableViT, batches: list[tuple[Tensor, Tensor]]) -> list:
    from pruners.model.tokens import Tokens

    return [Tokens(vit.embed(images)) for images, _ in batches]


@pytest.mark.parametrize("token", ["tome", "evit"])
def test_tokens_that_are_merged_or_dropped_are_taken_as_they_are(token: str, tiny) -> None:
    errors = []
    for compensated in (False, True):
        vit = tiny(img_size=(48, 32))
        whole, batches = same_model(vit), calibration(vit)
        units = load_method("grouped", criterion="magnitude", compensate=compensated)
        tokens = load_method(token)
        steps = (
            Step(pruner=units, thresholds={f"blocks.{i}.mlp.neuron": 0.5 for i in range(3)}),
            Step(pruner=tokens, thresholds={"blocks.1.token": 0.3}),
        )
        Plan(steps=steps).apply(vit, batches)
        with torch.no_grad():
            tokens.cut(whole, {}, {"blocks.1.token": 0.3})
            errors.append((vit(batches[0][0]) - whole(batches[0][0])).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_narrower_stream_comes_closer_to_the_channels_that_stay(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    whole, batches, channels = same_model(vit), calibration(vit), torch.arange(0, 24, 2)
    keep_width(vit, channels)
    images, errors = batches[0][0], []
    for _ in range(2):
        narrow, wide = before_last_norm(vit, images), before_last_norm(whole, images)
        errors.append((narrow - wide[..., channels]).square().mean().item())
        compensate(vit, Uncut(vit=whole, channels=channels), batches)
    assert errors[1] < 0.8 * errors[0]


def test_a_narrower_stream_is_exact_where_the_channels_that_went_said_nothing(tiny) -> None:
    vit = tiny(norm_layer="rmsnorm").double()
    with torch.no_grad():
        for module, name, axis in channel_slices(vit):
            if axis != 1 and "norm" not in type(module).__name__.lower():
                getattr(module, name).movedim(axis, 0)[20:] = 0.0
    whole, batches = same_model(vit), calibration(vit, torch.float64)
    keep_width(vit, torch.arange(20))
    compensate(vit, Uncut(vit=whole, channels=torch.arange(20)), batches)
    with torch.no_grad():
        assert torch.allclose(vit(batches[0][0]), whole(batches[0][0]), atol=1e-8)


def test_ragged_heads_keep_their_padding_zero(tiny) -> None:
    vit = tiny()
    method = load_method("uvc", units=("ragged_v_dim",))
    shape = vit.shape()
    scores = {site: torch.rand(units) for site, units in method.sites(shape).items()}
    shares = {site: 0.2 + 0.3 * (i % 3) for i, site in enumerate(scores)}
    uncut = method.cut_scored(vit, [], scores, shares)
    assert uncut is not None
    assert vit.masks
    compensate(vit, uncut, calibration(vit))
    layers = dict(vit.linears())
    for site, mask in vit.masks.items():
        assert bool((layers[site].weight[~mask] == 0.0).all())


def test_half_precision_models_are_solved_in_single_precision(tiny) -> None:
    vit = tiny().bfloat16()
    single = tiny()
    single.load_state_dict(vit.state_dict())
    method = load_method("grouped", criterion="magnitude", units=("qk_dim", "neuron"))
    scores, shares = method.score(single, []), dict.fromkeys(method.sites(single.shape()), 0.5)
    for model, dtype in ((vit, torch.bfloat16), (single, torch.float32)):
        uncut = method.cut_scored(model, [], scores, shares)
        assert uncut is not None
        compensate(model, uncut, calibration(model, dtype))
    for (name, found), wanted in zip(vit.named_parameters(), single.parameters(), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).norm() <= 0.05 * wanted.norm() + 1e-6, name


def test_the_mode_of_the_model_stays(tiny) -> None:
    vit = tiny(drop_path_rate=0.5).train()
    uncut, _ = cut_and_uncut(vit, ("neuron",), 0.5)
    compensate(vit, uncut, calibration(vit))
    assert vit.training


def test_without_images_it_says_what_to_give(tiny) -> None:
    with pytest.raises(ValueError, match="no calibration images; give batches of images, or comp"):
        load_method("grouped", criterion="magnitude").prune(
            tiny(), [], {"blocks.0.mlp.neuron": 0.5}
        )


def test_what_cannot_be_solved_is_named(tiny) -> None:
    vit = tiny()
    uncut, _ = cut_and_uncut(vit, ("neuron",), 0.5)
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^blocks\.1\.mlp\.fc[12] cannot be solved anew"):
        compensate(vit, uncut, calibration(vit))
