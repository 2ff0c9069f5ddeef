"""The kinds of units that no method scores by default."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pruners import cost_of
from pruners.families.unit import UnitPruner
from pruners.model.sites import KINDS
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
            heads = shape.blocks[int(site.split(".")[1])].heads
            scores[site] = torch.rand(heads, units) if per_head else torch.rand(units)
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
