"""Subnets against a dense model whose units and weights are masked by hand, in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from pruners import Plan, PrunableViT, Pruner, Step, load_method
from pruners.families.learned import Learned, LearnedPruner
from pruners.families.pruner import method_names
from pruners.families.unit import UnitPruner
from pruners.families.weight import WeightPruner
from pruners.model.shape import units_kept
from pruners.model.sites import KINDS, kind_of
from pruners.model.types import Batches, Scores
from pruners.subnet import Subnet, shared_scores
from tests.masked_width import masked_logits
from tests.models import VARIANTS, images_for

ADDERS = ("cait_tokens", "dynamic_vit", "spvit")
MOVERS = ("cap", "fast_cap", "mfac", "woodfisher")


def random_scores(pruner: Pruner, vit: PrunableViT, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    shape, layers, scores = vit.shape(), dict(vit.linears()), {}
    for site, units in pruner.sites(shape).items():
        size: tuple[int, ...] = (units,)
        if kind_of(site) in ("dim", "qk_dim", "v_dim"):
            size = (shape.blocks[int(site.split(".")[1])].heads, units)
        if pruner.family == "weight":
            size = tuple(layers[site].weight.shape)
        scores[site] = torch.rand(size, generator=generator)
    return scores


@dataclass(frozen=True, kw_only=True)
class AnyUnits(UnitPruner):
    """Cuts units of every kind, by scores drawn at random."""

    seed: int = 0

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        return tuple(KINDS)

    def score(self, vit: PrunableViT, batches: Batches) -> Scores:
        return random_scores(self, vit, self.seed)


@dataclass(frozen=True, kw_only=True)
class AnyWeights(WeightPruner):
    """Masks weights by scores drawn at random."""

    seed: int = 0

    def score(self, vit: PrunableViT, batches: Batches) -> Scores:
        return random_scores(self, vit, self.seed)


class ByHand:
    """What a plan leaves of a dense model, as bool marks on the dense units and weights."""

    def __init__(self, dense: PrunableViT, plan: Plan, scores: dict[Pruner, Scores]) -> None:
        self.shape = dense.shape()
        self.blocks = []
        for block in self.shape.blocks:
            on = {
                "qk": (block.heads, block.qk_dim),
                "v": (block.heads, block.v_dim),
                "hidden": (block.hidden,),
                "attn_out": (self.shape.dim,),
                "mlp_out": (self.shape.dim,),
            }
            self.blocks.append({k: torch.ones(s, dtype=torch.bool) for k, s in on.items()})
        self.weights: dict[str, Tensor] = {}
        for number, step in enumerate(plan.steps):
            after = Plan(steps=plan.steps[: number + 1]).shape(self.shape)
            if step.pruner.family == "unit":
                for index, kept in enumerate(after.blocks):
                    self._cut(index, kept, scores[step.pruner], step)
            elif step.pruner.family == "weight":
                for site, own in scores[step.pruner].items():
                    if site in after.nonzero:
                        self._mask(site, own, after.nonzero[site])

    def _cut(self, index, kept, scores, step) -> None:
        on, name = self.blocks[index], f"blocks.{index}"
        heads = on["v"].any(1)
        for head in heads.nonzero().flatten().tolist():
            for suffix, both in (("dim", True), ("v_dim", False)):
                own = scores.get(f"{name}.attn.heads.{head}.{suffix}")
                if own is not None:
                    # Sites count the heads that are left.
                    now = int(heads[:head].sum())
                    share = step.thresholds.get(f"{name}.attn.heads.{now}.{suffix}", 0.0)
                    left = units_kept(int(on["v"][head].sum()), share)
                    on["v"][head] = best(own, on["v"][head], left)
                    if both and not self.shape.qk_norm:
                        on["qk"][head] = on["v"][head]
        if (own := scores.get(f"{name}.attn.head")) is not None:
            gone = ~best(own, on["v"].any(1), kept.heads)
            on["v"][gone] = on["qk"][gone] = False
        for head in on["v"].any(1).nonzero().flatten().tolist():
            for part, kinds, left in (
                ("qk", ("qk_dim", "dim"), kept.qk_dim),
                ("v", ("v_dim", "dim"), kept.v_dim),
            ):
                for kind in kinds:
                    own = scores.get(f"{name}.attn.{kind}")
                    if own is not None and left < int(on[part][head].sum()):
                        on[part][head] = best(own[head], on[part][head], left)
        for part, site, left in (
            ("attn_out", f"{name}.attn.attn_out", kept.attn_out),
            ("hidden", f"{name}.mlp.neuron", kept.hidden),
            ("mlp_out", f"{name}.mlp.mlp_out", kept.mlp_out),
        ):
            if site in scores:
                on[part] = best(scores[site], on[part], left)
        if kept.heads == 0:
            for part in ("qk", "v", "attn_out"):
                on[part][:] = False
        if kept.hidden == 0:
            on["hidden"][:] = on["mlp_out"][:] = False

    def _mask(self, site: str, scores: Tensor, left: int) -> None:
        standing = self.masks()[f"vit.{site}.weight"] > 0
        self.weights[site] = best(scores.flatten(), standing.flatten(), left).view_as(scores)

    def masks(self) -> dict[str, Tensor]:
        """Parameter -> factors, 0 or 1, for those that are cut."""
        masks = {}
        for index, on in enumerate(self.blocks):
            rows = torch.cat([on["qk"].flatten(), on["qk"].flatten(), on["v"].flatten()])
            layers = {
                "attn.qkv": (rows, torch.ones(self.shape.dim, dtype=torch.bool)),
                "attn.proj": (on["attn_out"], on["v"].flatten()),
                "mlp.fc1": (on["hidden"], torch.ones(self.shape.dim, dtype=torch.bool)),
                "mlp.fc2": (on["mlp_out"], on["hidden"]),
            }
            for layer, (outputs, inputs) in layers.items():
                site = f"blocks.{index}.{layer}"
                both = outputs[:, None] & inputs & self.weights.get(site, torch.tensor(True))
                masks[f"vit.{site}.weight"] = both.double()
                masks[f"vit.{site}.bias"] = outputs.double()
        return masks


def best(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Mark the `count` candidates of highest score."""
    marks = torch.zeros_like(candidates)
    order = sorted(
        candidates.nonzero().flatten().tolist(), key=lambda i: scores[i].item(), reverse=True
    )
    marks[order[:count]] = True
    return marks


def check_against_masks(
    dense: PrunableViT, plan: Plan, scores: dict[Pruner, Scores], tokens: Plan | None = None
) -> Subnet:
    """Outputs and gradients of a subnet are those of the dense model, masked by hand."""
    dense = dense.double()
    subnet = Subnet(dense, plan, scores)
    with torch.no_grad():  # the subnet follows
        for parameter in dense.parameters():
            parameter.mul_(1.0 + 0.2 * torch.rand_like(parameter))
    subnet.refresh()
    masked = copy.deepcopy(dense)
    if tokens is not None:
        tokens.apply(masked)
    by_hand = ByHand(dense, plan, scores).masks()
    parameters = {
        name: p * by_hand.get(name, torch.ones(()).double())
        for name, p in masked.named_parameters()
    }
    images = images_for(dense, 4).double()
    weights = torch.randn(4, dense.vit.num_classes, generator=torch.Generator().manual_seed(8))
    expected = functional_call(masked, parameters, (images,))
    (expected * weights).sum().backward()
    first = torch.rand_like(dense.vit.head.weight)
    dense.vit.head.weight.grad = first.clone()  # what is there is added to
    for _ in range(2):
        logits = subnet.vit(images)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        (logits * weights).sum().backward()
        subnet.collect()
        assert all(p.grad is None for p in subnet.vit.parameters())
    for (name, own), other in zip(dense.named_parameters(), masked.parameters(), strict=True):
        wanted = 2 * (other.grad if other.grad is not None else torch.zeros_like(other))
        if name == "vit.head.weight":
            wanted = wanted + first
        found = own.grad if own.grad is not None else torch.zeros_like(own)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9, msg=name)
    assert subnet.vit.shape() == plan.shape(dense.shape())
    return subnet


def shares(pruner: Pruner, vit: PrunableViT, low: float = 0.2, high: float = 0.7) -> dict:
    """A different share for every site, in no order."""
    sites = list(pruner.sites(vit.shape()))
    return {
        site: low + (high - low) * ((7 * i + 3) % len(sites)) / len(sites)
        for i, site in enumerate(sites)
    }


def whole(pruner: Pruner, vit: PrunableViT) -> dict:
    """Whole branches of some blocks, and a part of the others."""
    gone = ("blocks.0.attn.head", "blocks.2.mlp.neuron", "blocks.1.block")
    return {**shares(pruner, vit), **{s: 1.0 for s in pruner.sites(vit.shape()) if s in gone}}


UNITS: dict[str, tuple[UnitPruner, Callable]] = {
    "heads": (AnyUnits(units=("head",)), shares),
    "qk_dims": (AnyUnits(units=("qk_dim",)), shares),
    "v_dims": (AnyUnits(units=("v_dim",)), shares),
    "heads_and_dims": (AnyUnits(units=("head", "dim")), shares),
    "neurons": (AnyUnits(units=("neuron",)), shares),
    "branches": (AnyUnits(units=("head", "neuron")), whole),
    "blocks": (AnyUnits(units=("block", "neuron")), whole),
    "writes": (AnyUnits(units=("attn_out", "mlp_out", "head", "neuron")), shares),
    "ragged": (AnyUnits(units=("ragged_dim", "attn_out")), shares),
    "ragged_padded": (AnyUnits(units=("ragged_dim", "neuron"), multiple=4), shares),
    "ragged_v": (AnyUnits(units=("ragged_v_dim",)), shares),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("units", UNITS)
def test_gradients_are_those_of_masked_units(units: str, variant: str, tiny) -> None:
    dense = tiny(**VARIANTS[variant])
    pruner, spread = UNITS[units]
    if not pruner.sites(dense.shape()):
        assert (units, variant) == ("qk_dims", "qk_norm")  # there are none to cut
        return
    plan = Plan(steps=(Step(pruner=pruner, thresholds=spread(pruner, dense)),))
    check_against_masks(dense, plan, {pruner: random_scores(pruner, dense, 1)})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("units", "token"),
    [
        ("heads_and_dims", ""),  # ToMe averages keys over heads, whose dims are others then
        ("ragged_padded", ""),
        ("branches", "tome"),
        ("writes", "tome"),
    ],
)
def test_weights_are_masked_by_the_dense_scores_of_what_is_left(
    units: str, token: str, variant: str, tiny
) -> None:
    dense = tiny(**VARIANTS[variant])
    (pruner, spread), weights = UNITS[units], AnyWeights()
    steps = [Step(pruner=pruner, thresholds=spread(pruner, dense))]
    tokens = None
    if token:
        merge = load_method(token)
        last = {"blocks.2.token": 0.4}  # its block has attention in every one of these
        steps.append(Step(pruner=merge, thresholds=last))
        tokens = Plan(steps=(steps[-1],))
    left = Plan(steps=tuple(steps)).shape(dense.shape())
    masked = {
        site: 0.1 + 0.5 * i / len(weights.sites(left)) for i, site in enumerate(weights.sites(left))
    }
    steps.append(Step(pruner=weights, thresholds=masked))
    scores = {p: random_scores(p, dense, 2 + i) for i, p in enumerate((pruner, weights))}
    check_against_masks(dense, Plan(steps=tuple(steps)), scores, tokens)


@pytest.mark.parametrize("pattern", ["none", "2:4"])
def test_weights_of_the_dense_model_are_masked(pattern: str, tiny) -> None:
    dense, pruner = tiny(), AnyWeights(pattern=pattern)
    plan = Plan(steps=(Step(pruner=pruner, thresholds=shares(pruner, dense, 0.4, 0.6)),))
    scores = {pruner: random_scores(pruner, dense, 3)}
    if pattern == "none":
        check_against_masks(dense, plan, scores)
        return
    subnet = Subnet(dense, plan, scores)
    for site, layer in subnet.vit.linears():
        kept = (layer.weight != 0.0).view(-1, 4)
        assert (kept.sum(1) == 2).all()
        own = scores[pruner][site].view(-1, 4)
        assert torch.equal(
            own.topk(2, dim=1).indices.sort(1).values, kept.nonzero()[:, 1].view(-1, 2)
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_token_reducers(variant: str, tiny) -> None:
    # Heads stay: EViT averages over heads, also over masked ones.
    dense, units, evit = tiny(**VARIANTS[variant]), UNITS["heads_and_dims"][0], load_method("evit")
    units = dataclasses.replace(units, units=("v_dim", "neuron"))
    drop = Step(pruner=evit, thresholds={"blocks.0.token": 0.3, "blocks.1.token": 0.4})
    plan = Plan(steps=(Step(pruner=units, thresholds=shares(units, dense)), drop))
    scores = {units: random_scores(units, dense, 4)}
    subnet = check_against_masks(dense, plan, scores, Plan(steps=(drop,)))
    assert subnet.vit.shape().reduced
    assert not dense.shape().reduced


SECOND = [
    (("head",), ("head", "neuron")),
    (("head", "qk_dim"), ("head", "qk_dim", "v_dim")),
    (("head",), ("ragged_dim", "neuron")),
    (("head", "dim"), ("ragged_v_dim",)),
    (("head", "neuron"), ("dim",)),
    (("neuron", "mlp_out", "attn_out"), ("neuron", "mlp_out", "attn_out")),
]


@pytest.mark.parametrize("first", [False, True], ids=["vit", "layer_scale"])
@pytest.mark.parametrize("units", SECOND)
def test_a_second_unit_step_has_the_scores_of_the_units_that_are_left(units, first, tiny) -> None:
    dense = tiny(**VARIANTS["layer_scale" if first else "vit"])
    one, two = AnyUnits(units=units[0]), AnyUnits(units=units[1], seed=1)
    begin = Step(pruner=one, thresholds=shares(one, dense, 0.3, 0.5))
    sites = list(two.sites(one.shrink(dense.shape(), begin.thresholds)))
    again = Step(
        pruner=two, thresholds={s: 0.3 + 0.4 * i / len(sites) for i, s in enumerate(sites)}
    )
    scores = {p: random_scores(p, dense, 5 + i) for i, p in enumerate((one, two))}
    check_against_masks(dense, Plan(steps=(begin, again)), scores)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_masked_channels(variant: str, tiny) -> None:
    dense, pruner = tiny(**VARIANTS[variant]).double(), AnyUnits(units=("width", "head", "neuron"))
    plan, scores = some_plan(pruner, dense), random_scores(pruner, dense, 4)
    subnet = Subnet(dense, plan, {pruner: scores})
    with torch.no_grad():  # the subnet follows
        for parameter in dense.parameters():
            parameter.mul_(1.0 + 0.2 * torch.rand_like(parameter))
    subnet.refresh()
    dim = plan.shape(dense.shape()).dim
    keep = best(scores["width"], torch.ones(24, dtype=torch.bool), dim)
    masks, own = ByHand(dense, plan, {pruner: scores}).masks(), dict(dense.named_parameters())
    masked = {n.removeprefix("vit."): p * masks[n] if n in masks else p for n, p in own.items()}
    images = images_for(dense, 4).double()
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(8)).double()
    expected, logits = masked_logits(dense, masked, images, keep), subnet.vit(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert dim < 20
    wanted = torch.autograd.grad((expected * weights).sum(), list(own.values()))
    (logits * weights).sum().backward()
    subnet.collect()
    for (name, parameter), gradient in zip(own.items(), wanted, strict=True):
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("units", [("attn_out", "mlp_out"), ("width", "neuron")])
def test_a_second_step_has_the_scores_of_the_channels_that_are_left(units, tiny) -> None:
    dense, one, two = tiny(init_values=0.4), AnyUnits(units=("width",)), AnyUnits(units=units)
    first, scores = {"width": 0.4}, {p: random_scores(p, dense, 5) for p in (one,)}
    scores[two] = random_scores(two, dense, 6)
    left = best(scores[one]["width"], torch.ones(24, dtype=torch.bool), 14).nonzero().flatten()
    again = dict.fromkeys(two.sites(one.shrink(dense.shape(), first)), 0.5)
    plan = Plan(steps=(Step(pruner=one, thresholds=first), Step(pruner=two, thresholds=again)))
    subnet, cut = Subnet(dense, plan, scores), copy.deepcopy(dense)
    one.cut(cut, scores[one], first)
    two.cut(cut, {k: s[left] if len(s) == 24 else s for k, s in scores[two].items()}, again)
    state = cut.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in subnet.vit.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kinds=st.sampled_from([u for u, _ in UNITS.values()]))
def test_any_plan_shares_its_weights(seed: int, kinds: UnitPruner) -> None:
    torch.manual_seed(seed)
    args = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    args |= {"num_classes": 5, "mlp_ratio": 1.5, "init_values": 0.5}
    from timm.models.vision_transformer import VisionTransformer

    dense = PrunableViT.from_state_dict(VisionTransformer(**args).state_dict(), **args).eval()
    weights = AnyWeights()
    cut = {site: 0.9 * torch.rand(()).item() for site in kinds.sites(dense.shape())}
    steps = [Step(pruner=kinds, thresholds=cut)]
    left = kinds.shrink(dense.shape(), cut)
    drawn = {site: 0.9 * torch.rand(()).item() for site in weights.sites(left)}
    steps.append(Step(pruner=weights, thresholds=drawn))
    scores = {p: random_scores(p, dense, seed + i) for i, p in enumerate((kinds, weights))}
    check_against_masks(dense, Plan(steps=tuple(steps)), scores)


def test_a_subnet_of_tuned_weights_is_the_plan_cut_from_them(tiny) -> None:
    """A cut of the tuned model by the same scores; weight scores travel through the surgery."""
    dense = tiny(init_values=0.4)
    units, merge, weights = load_method("grouped"), load_method("tome"), AnyWeights()
    steps = [Step(pruner=p, thresholds=shares(p, dense, 0.1, 0.5)) for p in (units, merge, weights)]
    scores = {p: random_scores(p, dense, 6 + i) for i, p in enumerate((units, weights))}
    subnet = Subnet(dense, Plan(steps=tuple(steps)), scores)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.randn_like(parameter))
    subnet.refresh()
    carrier = copy.deepcopy(dense)
    with torch.no_grad():
        for site, layer in carrier.linears():
            layer.weight.copy_(scores[weights][site])
    units.cut(carrier, scores[units], steps[0].thresholds)
    left = {site: layer.weight.detach() for site, layer in carrier.linears()}
    cut = copy.deepcopy(dense)
    for step, own in zip(steps, (scores[units], {}, left), strict=True):
        step.pruner.cut(cut, own, step.thresholds)
    state = cut.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in subnet.vit.state_dict().items())
    assert all(torch.equal(mask, subnet.vit.masks[site]) for site, mask in cut.masks.items())
    images = images_for(dense)
    with torch.no_grad():
        assert torch.equal(subnet.vit(images), cut(images))


def test_the_dense_model_stays_as_it_was(tiny) -> None:
    dense = tiny().train()
    dense.vit.pos_embed.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    pruner = AnyUnits(units=("ragged_dim", "neuron"))
    plan = Plan(steps=(Step(pruner=pruner, thresholds=shares(pruner, dense)),))
    subnet = Subnet(dense, plan, {pruner: random_scores(pruner, dense, 1)})
    (subnet.vit(images_for(dense)).square().sum()).backward()
    subnet.collect()
    assert subnet.vit.training
    assert not dense.masks
    assert dense.vit.pos_embed.grad is None
    assert not subnet.vit.vit.pos_embed.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    own = {id(p) for p in dense.parameters()}
    assert not own & {id(p) for p in subnet.vit.parameters()}
    assert {p.dtype for p in subnet.vit.parameters()} == {torch.float32}


def test_a_plan_that_does_nothing_is_the_dense_model(tiny) -> None:
    dense, pruner = tiny(), load_method("grouped")
    subnet = Subnet(dense, Plan(steps=(Step(pruner=pruner, thresholds={}),)), {})
    images = images_for(dense)
    with torch.no_grad():
        assert torch.equal(subnet.vit(images), dense(images))


def test_missing_scores_and_plans_that_do_not_fit_are_refused(tiny) -> None:
    dense, pruner = tiny(), load_method("grouped")
    plan = Plan(steps=(Step(pruner=pruner, thresholds=shares(pruner, dense)),))
    with pytest.raises(ValueError, match="no scores of grouped; give"):
        Subnet(dense, plan, {})
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.neuron' names no site"):
        Subnet(
            dense, Plan(steps=(Step(pruner=pruner, thresholds={"blocks.9.mlp.neuron": 0.5}),)), {}
        )


def some_plan(pruner: Pruner, vit: PrunableViT) -> Plan:
    return Plan(steps=(Step(pruner=pruner, thresholds=shares(pruner, vit)),))


@pytest.mark.parametrize(
    "name", [n for n in method_names() if not isinstance(load_method(n), LearnedPruner)]
)
def test_methods_share_weights_or_are_refused_by_name(name: str, tiny, batches) -> None:
    dense, pruner = tiny(), load_method(name)
    if isinstance(pruner, UnitPruner):
        pruner = dataclasses.replace(pruner, compensate=False)  # a trial's model is, a subnet never
    plan = some_plan(pruner, dense)
    before = copy.deepcopy(dense.state_dict())
    if name in (*ADDERS, *MOVERS):
        why = "adds weights of its own" if name in ADDERS else "changes the weights"
        with pytest.raises(ValueError, match=f"^{name} {why}"):
            shared_scores(dense, [plan], batches, {})
        return
    scores = shared_scores(dense, [plan], batches, {})
    cut = copy.deepcopy(dense)
    plan.apply(cut, batches)
    images = images_for(dense)
    with torch.no_grad():
        assert torch.equal(Subnet(dense, plan, scores).vit(images), cut(images))
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_methods_that_score_again_share_weights(tiny, batches) -> None:
    dense = tiny()
    for pruner in (
        load_method("taylor", rounds=3),
        load_method("magnitude", ramp_epochs=2),
        load_method("evit", ramp_epochs=2),
    ):
        plan = some_plan(pruner, dense)
        subnet = Subnet(dense, plan, shared_scores(dense, [plan], batches, {}))
        assert subnet.vit.shape() == plan.shape(dense.shape())


def test_selectors_are_refused_where_a_subnet_is_built(tiny) -> None:
    dense, pruner = tiny(), load_method("dynamic_vit")
    with pytest.raises(ValueError, match=r"dynamic_vit adds weights of its own \(vit\.blocks\."):
        Subnet(dense, some_plan(pruner, dense), {})


def test_learned_scores_are_shared_and_learned_weights_refused(tiny, batches) -> None:
    dense, pruner = tiny(), load_method("wdpruning", units=["head", "neuron"])
    own = random_scores(pruner, dense, 1)
    plan = some_plan(pruner, dense)
    found = shared_scores(dense, [plan], batches, {pruner: Learned(scores=own)})
    assert found[pruner] is own
    weights = copy.deepcopy(dense.vit.state_dict())
    weights["norm.bias"] += 1e-3
    with pytest.raises(ValueError, match=r"wdpruning changes the weights .* \(vit\.norm\.bias\)"):
        shared_scores(dense, [plan], batches, {pruner: Learned(scores=own, weights=weights)})


def test_each_method_is_scored_once_and_idle_steps_not_at_all(tiny, batches, monkeypatch) -> None:
    dense, pruner, idle = tiny(), AnyUnits(units=("head",)), AnyWeights()
    seen: list[int] = []
    score = AnyUnits.score
    monkeypatch.setattr(AnyUnits, "score", lambda *given: seen.append(1) or score(*given))
    plan = some_plan(pruner, dense)
    plans = [plan, Plan(steps=(*plan.steps, Step(pruner=idle, thresholds={})))]
    assert list(shared_scores(dense, plans, batches, {})) == [pruner]
    assert len(seen) == 1


def test_scores_that_rounding_changes_are_no_reason_to_refuse(tiny, batches, monkeypatch) -> None:
    dense, units, weights = tiny(), AnyUnits(units=("neuron",)), AnyWeights()
    seeds = itertools.count()  # other scores each time
    for kind in (AnyUnits, AnyWeights):
        monkeypatch.setattr(
            kind, "score", lambda self, vit, _: random_scores(self, vit, next(seeds))
        )
    plan = Plan(steps=(*some_plan(units, dense).steps, *some_plan(weights, dense).steps))
    assert set(shared_scores(dense, [plan], batches, {})) == {units, weights}
