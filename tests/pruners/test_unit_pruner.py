"""The kinds of units that no method scores by default."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pruners import cost_of
from pruners.sites import KINDS
from pruners.unit_pruner import UnitPruner
from tests.conftest import VARIANTS, images_for


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
    pruner = RandomUnits(units=units, multiple=multiple)
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
