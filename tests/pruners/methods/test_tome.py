from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import PrunableViT, cost_of, load_method
from pruners.methods.tome import MergeSimilar, match
from pruners.model.attention import Attended
from pruners.model.tokens import Tokens
from tests.models import VARIANTS, images_for

LARGE = {"img_size": (48, 32)}  # 24 patches


def attended(keys: Tensor) -> Attended:
    """Attention that has only keys [B, N, K], the same in each of two heads."""
    both = torch.stack([keys, keys], dim=1)
    return Attended(output=keys, query=both, key=both)


def merge(x: Tensor, keys: Tensor, merged: int, prefix: int = 1, size: Tensor | None = None):
    reducer = MergeSimilar(prefix, keys.shape[-1], merged)
    return reducer(Tokens(x, size), attended(keys), 1.0)


@given(
    patches=st.integers(2, 20),
    prefix=st.integers(0, 3),
    wanted=st.integers(0, 10),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_sizes_and_weighted_sums_are_conserved(patches, prefix, wanted, seed) -> None:
    torch.manual_seed(seed)
    merged = min(wanted, patches // 2)
    x = torch.randn(2, prefix + patches, 6, dtype=torch.float64)
    size = torch.randint(1, 5, (2, prefix + patches)).double()
    size[:, :prefix] = 1.0
    out = merge(x, torch.randn(2, prefix + patches, 4), merged, prefix, size)
    assert out.x.shape[1] == prefix + patches - merged
    torch.testing.assert_close(out.size.sum(1), size.sum(1))
    total = (out.x * out.size.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(total, (x * size.unsqueeze(-1)).sum(1))
    assert torch.equal(out.x[:, :prefix], x[:, :prefix])  # class, distillation, register tokens
    assert torch.equal(out.size[:, :prefix], size[:, :prefix])


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_matching_is_the_papers_with_protected_tokens(prefix: int) -> None:
    """Written out with loops over all tokens, prefix in place, as the paper's code has it."""
    keys = torch.randn(4, prefix + 9, 5)
    merged = 4
    x = torch.randn(4, prefix + 9, 3)
    out = merge(x, keys, merged, prefix)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    for image in range(4):
        a, b = range(0, prefix + 9, 2), range(1, prefix + 9, 2)
        best = {}
        for i in a:
            if i >= prefix:
                similar = {j: (unit[image, i] @ unit[image, j]).item() for j in b if j >= prefix}
                best[i] = max(similar.items(), key=lambda pair: pair[1])
        gone = sorted(best, key=lambda i: -best[i][1])[:merged]
        groups = {j: [j] for j in b if j >= prefix}
        for i in gone:
            groups[best[i][0]].append(i)
        kept = [[i] for i in a if i >= prefix and i not in gone]
        expected = torch.stack([x[image, g].mean(0) for g in [*kept, *groups.values()]])
        torch.testing.assert_close(out.x[image, prefix:], expected)


def test_repeated_merges_are_means_of_all_members() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 17, 4, dtype=torch.float64)
    members = torch.eye(17, dtype=torch.float64).unsqueeze(0)  # token -> share of each original
    tokens, sources = Tokens(x), Tokens(members)
    for merged in (5, 4, 3):
        keys = torch.randn(1, tokens.x.shape[1], 4)
        reducer = MergeSimilar(1, 4, merged)
        tokens = reducer(tokens, attended(keys), 1.0)
        sources = reducer(sources, attended(keys), 1.0)
    shares = sources.x[0]  # each row: 1 / number of members at the members
    for row, size in zip(shares, tokens.size[0], strict=True):
        assert int((row > 0).sum()) == size
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / size.item()))
    torch.testing.assert_close(tokens.x[0], shares @ x[0])


def test_identical_patches_are_merged_first() -> None:
    keys = torch.randn(1, 8, 16)
    keys[0, 5] = keys[0, 2]  # patches 2 (of A, with an even prefix) and 5 (of B)
    pairs = match(keys, merged=1, first=0)
    assert pairs.gone.item() == 1  # the second of A: patch 2
    assert pairs.partner.item() == 2  # the third of B: patch 5


@pytest.mark.parametrize("fused", [True, False])
def test_a_token_of_size_two_acts_as_two_equal_tokens(fused: bool, tiny) -> None:
    vit = tiny()
    attn = vit.blocks[0].attn
    attn.fused_attn = fused
    x = torch.randn(2, 5, 24)
    twice = torch.cat([x, x[:, 3:4]], dim=1)
    size = torch.tensor([[1.0, 1.0, 1.0, 2.0, 1.0]]).expand(2, -1)
    expected = attn(twice).output[:, :5]
    torch.testing.assert_close(attn(x, size).output, expected, atol=1e-6, rtol=0)
    assert (attn(x).output - expected).abs().max() > 1e-4


def test_pooled_models_weight_the_mean_by_size(tiny) -> None:
    vit = tiny(**VARIANTS["pooled"], **LARGE)
    load_method("tome").cut(vit, {}, {"blocks.1.token": 0.4})
    images = images_for(vit)
    tokens = vit.tokens(images)
    assert tokens.size.max() > 1
    assert (tokens.size.sum(1) == 24).all()
    mean = (tokens.x * tokens.size.unsqueeze(-1)).sum(1) / 24
    expected = vit.vit.head(vit.vit.fc_norm(mean))
    torch.testing.assert_close(vit(images), expected)
    assert (vit(images) - vit.vit.forward_head(tokens.x)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("deit_tiny_patch16_224", {8: 0.92, 13: 0.73, 16: 0.62}),
        ("deit_small_patch16_224", {8: 3.42, 13: 2.70, 16: 2.29}),
        ("deit_base_patch16_224", {8: 13.10, 13: 10.37, 16: 8.77}),
    ],
)
def test_published_macs(name: str, gmacs: dict[int, float]) -> None:
    with torch.device("meta"):
        shape = PrunableViT(VisionTransformer(**ARCHS[name])).shape()
    tome = load_method("tome")
    for merged, expected in gmacs.items():
        thresholds, patches = {}, 196
        for block in range(12):
            here = min(merged, patches // 2)
            thresholds[f"blocks.{block}.token"] = here / patches
            patches -= here
        shrunk = tome.shrink(shape, thresholds)
        assert shrunk.blocks[-1].mlp_tokens == 1 + patches
        assert {8: 101, 13: 41, 16: 11}[merged] == 1 + patches
        assert cost_of(shrunk).gmacs == pytest.approx(expected, rel=0.01)


ARCHS = {
    "deit_tiny_patch16_224": {"embed_dim": 192, "num_heads": 3},
    "deit_small_patch16_224": {"embed_dim": 384, "num_heads": 6},
    "deit_base_patch16_224": {"embed_dim": 768, "num_heads": 12},
}
