from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruners import PrunableViT, ViTShape, cost_of
from search.space.absolute import budget_in_shares, macs_of
from search.space.build import build_space
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep

TINY_GMACS, SMALL_GMACS, BASE_GMACS = 1.25, 4.60, 17.56
"""Of DeiT at 224 pixels, as published (arXiv:2012.12877)."""


def deit(size: str, **args: object) -> ViTShape:
    with torch.device("meta"):
        name = f"deit_{size}_patch16_224"
        return PrunableViT.from_timm(name, pretrained=False, **args).shape()


@pytest.mark.parametrize(
    ("setting", "low", "high"),
    [
        ("budget_gmacs=[2.0, 4.6]", 2.0, 4.6),
        ("budget_of='deit_small_patch16_224'", SMALL_GMACS / 2, SMALL_GMACS),
        ("budget_of=['deit_tiny_patch16_224', 'deit_small_patch16_224']", TINY_GMACS, SMALL_GMACS),
        ("budget_of=['deit_small_patch16_224', 'deit_base_patch16_224']", SMALL_GMACS, BASE_GMACS),
        ("budget=[0.25, 0.5]", 0.25 * BASE_GMACS, 0.5 * BASE_GMACS),
    ],
)
def test_deit_b_cut_to_other_costs(setting: str, low: float, high: float, sweep_file: Path) -> None:
    sweep, dense = load_sweep(sweep_file, [setting, "cost='gmacs'"]), deit("base")
    budget = budget_in_shares(sweep, dense, cost_of(dense).macs)
    assert budget.low * BASE_GMACS == pytest.approx(low, rel=0.005)
    assert budget.high * BASE_GMACS == pytest.approx(high, rel=0.005)
    assert budget.high <= 1.0


def test_the_other_model_sees_the_same_images() -> None:
    """At 112 pixels there are 49 patches; cost follows in closed form."""
    like = deit("base", img_size=112, num_classes=10)
    macs, tokens, dim = macs_of("deit_small_patch16_224", like), 50, 384
    blocks = 12 * (tokens * 12 * dim**2 + 2 * tokens**2 * dim)
    assert macs == blocks + 49 * 3 * 16 * 16 * dim + 10 * dim
    assert macs_of("deit_base_patch16_224", like) == cost_of(like).macs


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "budget_gmacs=[2.0, 18.0]",
            r"budget_gmacs is 2 to 18 GMACs, and the dense model has 17\.5. ",
        ),
        (
            "budget_of=['deit_small_patch16_224', 'deit_tiny_patch16_224']",
            r"budget_of is 4\.\d+ to 1\.\d+ GMACs, .* give low < high",
        ),
        ("budget_of='vit_large_patch16_224'", r"budget_of is 30\.\d+ to 61\.\d+ GMACs"),
        (
            "budget_of='deit_smal'",
            "budget_of: model name 'deit_smal' is unknown to timm; names like",
        ),
        ("budget_of='resnet18'", "budget_of: "),
    ],
)
def test_a_range_that_is_none_is_refused(setting: str, message: str, sweep_file: Path) -> None:
    sweep, dense = load_sweep(sweep_file, [setting]), deit("base")
    with pytest.raises(SweepError, match=message) as error:
        budget_in_shares(sweep, dense, cost_of(dense).effective_macs)
    assert "\n" not in str(error.value)


def test_the_space_of_an_absolute_budget_is_that_of_its_shares(sweep_file: Path, tiny) -> None:
    shape = tiny(patch_size=4).shape()
    gmacs = cost_of(shape).gmacs
    absolute = load_sweep(sweep_file, [f"budget_gmacs=[{0.5 * gmacs!r}, {0.9 * gmacs!r}]"])
    space = build_space(absolute, shape)
    assert (space.low, space.high) == pytest.approx((0.5, 0.9))
    known = absolute.in_shares(space.low, space.high)
    assert build_space(known, shape) == space
