"""The kinds of units that no method scores by default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from pruners import Plan, Step, cost_of, load_method
from pruners.families.unit import UnitPruner
from pruners.model.compensation import compensate
from pruners.model.sites import KINDS, block_of
from pruners.model.width import narrowed
from tests.models import VARIANTS, images_for


@dataclass(frozen=True, kw_only=True)
class RandomUnits(UnitPruner):
    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        return tuple(KINDS)

    def score(self, vit, batches):
        shape, scores = vit.shape(), {}
        for site, units in self.sites(shape).items():
            per_head = site.endswith("dim") and "heads" not in site
            size = (shape.blocks[block_of(site)].heads, units) if per_head else (units,)
            scores[site] = torch.rand(size)
        return scores


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "units",
    [
        ("dim", "neuron"),
        ("head", "dim", "attn_out", "mlp_out"),
        ("ragged_dim", "attn_out"),
        ("ragged_v_dim", "neuron"),
        ("width",),
        ("head", "dim", "neuron", "width"),
        ("ragged_dim", "width", "block"),
    ],
)
def test_the_cut_gives_the_predicted_shape(units, variant: str, multiple: int, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    pruner = RandomUnits(units=units, multiple=multiple, compensate=False)
    sites = list(pruner.sites(vit.shape()))
    shares = {site: 0.1 + 0.6 * i / len(sites) for i, site in enumerate(sites)}
    shares |= {site: 1.0 for site in sites if site.startswith("blocks.0.attn.heads.1.")}
    predicted = pruner.shrink(vit.shape(), shares)
    pruner.prune(vit, [], shares)
    assert vit.shape() == predicted
    assert cost_of(predicted).params == sum(p.numel() for p in vit.parameters())
    assert torch.isfinite(vit(images_for(vit))).all()


def test_scores_of_another_network_are_refused(tiny) -> None:
    vit, pruner, site = tiny(), RandomUnits(units=("neuron",)), "blocks.0.mlp.neuron"
    with pytest.raises(ValueError, match=f"scores of 7 units at {site}, which has 96"):
        pruner.cut(vit, {site: torch.rand(7)}, {site: 0.5})


def test_overlapping_kinds_are_refused() -> None:
    for units in (("dim", "v_dim"), ("head", "ragged_dim"), ("ragged_dim", "ragged_v_dim")):
        with pytest.raises(ValueError, match="whose head dims overlap"):
            RandomUnits(units=units)


def test_the_width_goes_before_what_branches_write(tiny) -> None:
    with pytest.raises(ValueError, match="give 'width' without 'mlp_out'"):
        RandomUnits(units=("width", "mlp_out"))
    vit, width = tiny(), RandomUnits(units=("width", "neuron"), compensate=False)
    writes = RandomUnits(units=("attn_out",), compensate=False)
    both = Plan(
        steps=(
            Step(pruner=width, thresholds={"width": 0.5}),
            Step(pruner=writes, thresholds={"blocks.1.attn.attn_out": 0.25}),
        )
    )
    both.apply(vit)
    assert (vit.shape().dim, vit.shape().blocks[1].attn_out) == (12, 9)
    assert "width" not in width.sites(vit.shape())
    with pytest.raises(ValueError, match="'width' is given for a network whose branches write to"):
        width.shrink(vit.shape(), {"width": 0.5})
    assert width.shrink(vit.shape(), {"blocks.0.mlp.neuron": 0.5}).blocks[0].hidden == 48


def test_the_width_is_compensated_before_other_units_go(tiny, batches) -> None:
    pruner = load_method("grouped", criterion="magnitude", units=("neuron", "width"))
    neurons = {"blocks.0.mlp.neuron": 0.5, "blocks.2.mlp.neuron": 0.25}
    vit, other, plain = tiny(), tiny(), tiny()
    scores = pruner.score(vit, [])
    pruner.prune(other, batches, {"width": 0.25})
    pruner.cut(plain, scores, {"width": 0.25, **neurons})
    pruner.prune(vit, batches, {**neurons, "width": 0.25})
    uncut = pruner.cut_scored(other, [], scores, neurons)
    compensate(other, uncut, batches)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
    assert not torch.equal(vit.blocks[0].mlp.fc2.weight, plain.blocks[0].mlp.fc2.weight)


def test_one_channel_at_least_stays(tiny) -> None:
    shape, width = tiny().shape(), RandomUnits(units=("width",))
    assert width.sites(shape) == {"width": 24}
    assert width.shrink(shape, {"width": 0.99}).dim == 1
    with pytest.raises(ValueError, match="threshold of width is 1; give a share below 1"):
        width.shrink(shape, {"width": 1.0})
    for name in ("x_pruner", "wdpruning", "uvc", "vit_slim", "cait_channels"):
        with pytest.raises(ValueError, match=rf"units of {name} is \['width'\]; give some of"):
            load_method(name, units=["width"])


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.4])
def test_channels_and_other_units_lose_the_same_share(ratio: float, multiple: int, tiny) -> None:
    shape, macs = tiny().shape(), ratio * cost_of(tiny().shape()).effective_macs
    pruner = RandomUnits(units=("head", "neuron", "width"), multiple=multiple)
    others = dataclasses.replace(pruner, units=("head", "neuron"))
    torch.manual_seed(7)
    scores = pruner.score(tiny(), [])
    shares = pruner.allocate(shape, scores, macs)
    assert cost_of(pruner.shrink(shape, shares)).effective_macs <= macs
    channels, ascending = round(24 * shares["width"]), scores["width"].sort().values
    rest = {site: own for site, own in scores.items() if site != "width"}

    def lost(channels: int) -> tuple[float, float]:
        left = pruner.shrink(shape, {"width": channels / 24})
        found = others.allocate(left, rest, macs)
        gone = sum(own.sort().values[: round(found[s] * len(own))].sum() for s, own in rest.items())
        total = sum(own.sum() for own in rest.values())
        return (ascending[:channels].sum() / ascending.sum()).item(), (gone / total).item()

    assert lost(channels)[0] >= lost(channels)[1]
    assert lost(channels - 1)[0] < lost(channels - 1)[1]
    assert pruner.allocate(shape, {**scores, "width": 1e3 * scores["width"]}, macs) == shares


def test_channels_that_hold_nothing_go_first(tiny) -> None:
    shape, pruner = tiny().shape(), RandomUnits(units=("head", "neuron", "width"))
    scores, budget = pruner.score(tiny(), []), 0.6 * cost_of(tiny().shape()).effective_macs
    scores["width"][3:] = 0.0
    empty = pruner.allocate(shape, scores, budget)
    assert empty["width"] == min(n for n in range(24) if narrow_macs(shape, 24 - n) <= budget) / 24
    assert sum(empty.values()) == empty["width"]


def test_the_width_alone_reaches_a_budget_and_gives_way_to_what_cannot(tiny) -> None:
    shape, budget = tiny().shape(), 0.3 * cost_of(tiny().shape()).effective_macs
    only = RandomUnits(units=("width",))
    (share,) = only.allocate(shape, {"width": torch.rand(24)}, budget).values()
    dim = only.shrink(shape, {"width": share}).dim
    assert narrow_macs(shape, dim) <= budget < narrow_macs(shape, dim + 1)
    pruner = RandomUnits(units=("head", "width"))
    scores = pruner.score(tiny(), [])
    scores["width"][:] = 1e-3
    scores["width"][0] = 1.0  # nearly all of the width's score: cut last
    cut = pruner.shrink(shape, pruner.allocate(shape, scores, budget))
    assert cost_of(cut).effective_macs <= budget
    with pytest.raises(ValueError, match="effective GMACs is out of reach"):
        pruner.allocate(shape, scores, 1.0)


def narrow_macs(shape, dim: int) -> int:
    return cost_of(narrowed(shape, dim)).macs


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sizes_are_rounded_and_no_layer_is_emptied(share: float, tiny) -> None:
    shape = tiny().shape()
    pruner = RandomUnits(units=("head", "dim", "neuron", "attn_out", "mlp_out"), multiple=4)
    cut = pruner.shrink(shape, dict.fromkeys(pruner.sites(shape), share))
    for block in cut.blocks:
        sizes = (block.qk_dim, block.v_dim, block.hidden, block.attn_out, block.mlp_out)
        assert all(size % 4 == 0 and size >= 4 for size in sizes)
        assert block.heads >= 1


def test_a_global_ranking_removes_that_share_of_all_units(tiny) -> None:
    """Units of one size each, so that a share of the cost is a share of the units."""
    shape = tiny().shape()
    pruner = RandomUnits(units=("neuron",))
    torch.manual_seed(5)
    scores = pruner.score(tiny(), [])
    per_neuron = 2 * 7 * 24  # 7 tokens, width 24
    macs = cost_of(shape).effective_macs - 130 * per_neuron
    shares = pruner.allocate(shape, scores, macs)
    cut = {site: round(share * 96) for site, share in shares.items()}
    assert sum(cut.values()) == 130
    assert len(set(cut.values())) == 3
    limit = torch.cat(list(scores.values())).sort().values[130]
    assert all(int((scores[site] < limit).sum()) == count for site, count in cut.items())
