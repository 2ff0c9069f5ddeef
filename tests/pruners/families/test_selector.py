from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled

from pruners import PrunableViT, ViTShape, cost_of
from pruners.families.selector import EMBEDDINGS, SelectorPruner
from pruners.model.tokens import FrontReducer, TokenReducer, Tokens
from pruners.model.types import Thresholds
from tests.models import TINY, images_for

DEEP = {"img_size": (48, 32), "depth": 12}  # 24 patches


@dataclass(frozen=True, kw_only=True)
class First(SelectorPruner):
    """Keeps the patches that come first."""

    per_image: ClassVar[bool] = True

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        counts = self.counts(shape, thresholds)
        return {b: KeepFirst(shape.prefix_tokens + count) for b, count in counts.items()}


class Pairs(First):
    least_dropped: ClassVar[int] = 2


class Whole(First):
    per_image: ClassVar[bool] = False


class KeepFirst(FrontReducer):
    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def tokens_after(self, tokens: int) -> int:
        return self.kept

    def macs(self, tokens: int) -> int:
        return 5_000  # what a selector costs whatever it keeps

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens._replace(x=tokens.x[:, : self.kept])


def same(share: float, *blocks: int) -> dict[str, float]:
    return {f"blocks.{block}.token": share for block in blocks}


def test_sites_are_the_papers_places_or_those_of_the_option(tiny) -> None:
    shape = tiny(**DEEP).shape()
    assert First().sites(shape) == {f"blocks.{b}.token": 24 for b in (3, 6, 9)}
    # Sorted, and also blocks that are not at quarters.
    assert list(First(blocks=(7, 1)).sites(shape)) == ["blocks.1.token", "blocks.7.token"]
    # Nothing in front of the first block: selectors read what blocks made of the patches.
    assert list(First().sites(tiny().shape())) == ["blocks.1.token", "blocks.2.token"]


@pytest.mark.parametrize("blocks", [(0,), (-1, 2), (2.0,), ("3",), (True,)])
def test_blocks_that_cannot_be_are_refused(blocks: tuple[object, ...]) -> None:
    right = "each a whole number, at least 1"
    with pytest.raises(ValueError, match=rf"option blocks of test_selector is \[.*{right}"):
        First(blocks=blocks)


def test_blocks_that_come_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"option blocks of test_selector is \[3, 3\].*different"):
        First(blocks=(3, 3))


def test_a_block_that_the_model_lacks_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"option blocks of .* has 3; give 1 to 2 of this model"):
        First(blocks=(1, 3)).sites(tiny().shape())


@pytest.mark.parametrize("option", ["ratio_weight", "token_weight"])
@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_negative_weights_are_refused(option: str, weight: float) -> None:
    with pytest.raises(
        ValueError, match=f"option {option} of .* is {weight}; give a number, at least 0"
    ):
        First(**{option: weight})


def test_shares_compound_and_counts_are_rounded_down_once(tiny) -> None:
    with torch.device("meta"):
        shape = PrunableViT.from_timm("deit_small_patch16_224", pretrained=False).shape()
    assert First().counts(shape, same(0.3, 9, 3, 6)) == {3: 137, 6: 96, 9: 67}
    ten = tiny(img_size=(40, 16)).shape()  # 0.7 * 10 is 6.999999999999999
    assert First().counts(ten, same(1 - 0.7, 1)) == {1: 7}
    assert First().counts(ten, {"blocks.1.token": 0.999, "blocks.2.token": 0.5}) == {1: 1}


def test_selectors_that_drop_too_little_are_left_out(tiny) -> None:
    shape = tiny(**DEEP).shape()
    shares = {"blocks.3.token": 0.03, "blocks.6.token": 0.03, "blocks.9.token": 0.5}
    assert First().counts(shape, shares) == {3: 23, 6: 22, 9: 11}
    # What one that was left out would have dropped is dropped by the next.
    assert Pairs().counts(shape, shares) == {6: 22, 9: 11}
    assert First().counts(shape, same(0.0, 3, 6, 9)) == {}


@given(shares=st.lists(st.floats(0.0, 0.999), min_size=3, max_size=3))
def test_counts_fall_and_follow_the_product_of_what_is_left(shares: list[float]) -> None:
    shape = PATCHES_24
    thresholds = {f"blocks.{b}.token": s for b, s in zip((3, 6, 9), shares, strict=True)}
    for pruner, least in ((First(), 1), (Pairs(), 2)):
        counts = pruner.counts(shape, thresholds)
        before, left = 24, 1.0
        for block, share in zip((3, 6, 9), shares, strict=True):
            left *= 1.0 - share
            kept = counts.get(block, before)
            assert 1 <= kept <= before
            assert before - kept >= least or block not in counts
            wanted = max(1, math.floor(24 * left + 1e-9))
            assert kept - wanted in range(least)
            before = kept


def test_the_loss_aims_at_what_inference_keeps(tiny) -> None:
    shape = tiny(**DEEP, reg_tokens=1).shape()
    shares = {"blocks.3.token": 0.3, "blocks.9.token": 0.4}
    loss = First(ratio_weight=5.0, token_weight=0.25).loss(shape, shares)
    assert loss.targets == (16 / 24, 10 / 24)
    assert (loss.prefix_tokens, loss.patches) == (2, 24)
    assert (loss.ratio_weight, loss.token_weight, loss.per_image) == (5.0, 0.25, True)
    assert Whole().loss(shape, shares).per_image is False
    assert First().loss(shape, same(0.0, 3)) is None


def test_one_share_for_all_sites_of_the_option(tiny) -> None:
    shape = tiny(**DEEP).shape()
    dense = cost_of(shape).effective_macs
    pruner = First(blocks=(8, 2))
    shares = pruner.allocate(shape, {}, 0.7 * dense)
    assert list(shares) == ["blocks.2.token", "blocks.8.token"]
    assert len(set(shares.values())) == 1
    assert 0.62 * dense < cost_of(pruner.shrink(shape, shares)).effective_macs <= 0.7 * dense


def test_a_budget_that_the_dense_model_meets_needs_no_selector(tiny) -> None:
    shape = tiny(**DEEP).shape()
    shares = First().allocate(shape, {}, cost_of(shape).effective_macs)
    assert set(shares.values()) == {0.0}


def test_embeddings_are_held_fixed_where_there_is_a_selector() -> None:
    vit = PrunableViT(VisionTransformerDistilled(**TINY, reg_tokens=0))
    First().cut(vit, {}, same(0.0, 1))
    assert all(parameter.requires_grad for parameter in vit.parameters())
    First().cut(vit, {}, same(0.5, 1))
    fixed = {name for name, p in vit.vit.named_parameters() if not p.requires_grad}
    assert fixed == {"cls_token", "dist_token", "pos_embed"} == set(EMBEDDINGS) - {"reg_token"}


def test_register_tokens_are_held_fixed_and_pooled_models_have_no_prefix(tiny) -> None:
    for args, names in (
        ({"reg_tokens": 2}, {"cls_token", "reg_token", "pos_embed"}),
        ({"class_token": False, "global_pool": "avg"}, {"pos_embed"}),
    ):
        vit = tiny(**args)
        First().cut(vit, {}, same(0.5, 1))
        assert {n for n, p in vit.vit.named_parameters() if not p.requires_grad} == names
        assert torch.isfinite(vit(images_for(vit))).all()


def build_shape() -> ViTShape:
    with torch.device("meta"):
        return PrunableViT.from_timm(
            "vit_tiny_patch16_224", pretrained=False, img_size=(96, 64)
        ).shape()


PATCHES_24 = build_shape()
