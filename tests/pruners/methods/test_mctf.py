from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pruners import load_method
from pruners.methods.mctf import MCTF, attention_received, attraction, bidirectional_match
from pruners.model.attention import Attended
from pruners.model.tokens import Tokens

SCALE = 0.7


def attended(tokens: int) -> Attended:
    query, key = torch.randn(2, 2, 3, tokens, 8)
    return Attended(output=key, query=query, key=key)


def received_by_loops(of: Attended, size: Tensor, image: int) -> list[float]:
    """Mean over heads and queries of the attention to each token, a key of size s being s keys."""
    query, key, s = of.query[image].double(), of.key[image].double(), size[image].tolist()
    heads, tokens, _ = query.shape
    found = [0.0] * tokens
    for head in range(heads):
        for i in range(tokens):
            seen = [
                s[j] * math.exp(SCALE * (query[head, i] @ key[head, j]).item())
                for j in range(tokens)
            ]
            for j in range(tokens):
                found[j] += seen[j] / sum(seen) / heads / tokens
    return found


def groups_by_loops(
    x: Tensor, a: list[float], s: list[float], merged: int, prefix: int, method: MCTF
) -> list[list[int]]:
    """Which tokens become one, as the authors' code finds them; in the order in which they leave.

    Products of the criteria, 1 / a and 1 / s scaled to a largest value of 1, all tokens in turn in
    A and B with the prefix tokens never chosen.
    """
    tokens = len(x)
    info = [min(a) / each for each in a]
    small = [min(s) / each for each in s]

    def attracted(i: int, j: int) -> float:
        alike = 0.5 * (1.0 + torch.cosine_similarity(x[i], x[j], dim=0).item())
        return (
            alike**method.tau_sim
            * (info[i] * info[j]) ** method.tau_info
            * (small[i] * small[j]) ** method.tau_size
        )

    side_a = [i for i in range(0, tokens, 2) if i >= prefix]
    side_b = [i for i in range(1, tokens, 2) if i >= prefix]
    members = {i: [i] for i in range(tokens)}
    for side, other, count in (
        (side_a, side_b, merged // 2),
        (side_b, side_a, merged - merged // 2),
    ):
        best = {i: max(other, key=lambda j, i=i: attracted(i, j)) for i in side}
        for i in sorted(side, key=lambda i: -attracted(i, best[i]))[:count]:
            members[best[i]] += members.pop(i)
            side.remove(i)
    return [members[i] for i in [*range(prefix), *side_a, *side_b]]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("merged", [1, 3, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"tau_info": 1.0, "tau_size": 0.5}, {"tau_sim": 0.0, "tau_info": 2.0, "tau_size": 0.1}],
)
def test_the_fusion_is_the_papers(prefix: int, merged: int, options: dict, tiny) -> None:
    tokens, method = prefix + 11, load_method("mctf", **options)
    x, of = torch.randn(2, tokens, 24), attended(tokens)
    size = torch.randint(1, 5, (2, tokens)).float()
    reducer = method.reducer(_shape(tiny, prefix), 0, merged)
    out = reducer(Tokens(x, size), of, SCALE)
    for image in range(2):
        a, s = received_by_loops(of, size, image), size[image].tolist()
        groups = groups_by_loops(x[image].double(), a, s, merged, prefix, method)
        assert len(groups) == out.x.shape[1]
        for place, group in enumerate(groups):
            weights = [a[i] * s[i] for i in group]
            mean = sum(w * x[image, i] for w, i in zip(weights, group, strict=True)) / sum(weights)
            torch.testing.assert_close(out.x[image, place], mean, atol=1e-5, rtol=1e-4)
            assert out.size[image, place] == sum(s[i] for i in group)


def _shape(tiny, prefix: int):
    if prefix == 0:
        return tiny(class_token=False, global_pool="avg").shape()
    return tiny(reg_tokens=prefix - 1).shape()


def test_attention_received_counts_sizes() -> None:
    of, size = attended(6), torch.tensor([[1.0, 1, 4, 1, 2, 1], [1.0] * 6])
    found = attention_received(of, SCALE, size)
    for image in range(2):
        assert found[image].tolist() == pytest.approx(received_by_loops(of, size, image), rel=1e-5)
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(attention_received(of, SCALE, None)[1], found[1])


def test_without_the_other_criteria_similarity_decides() -> None:
    x, size = torch.randn(2, 10, 6), torch.randint(1, 9, (2, 10)).float()
    received = torch.rand(2, 10)
    only = load_method("mctf", tau_info=0.0, tau_size=0.0)
    found = attraction(x, received, size, 0, only).exp()
    cosines = torch.cosine_similarity(x[:, ::2].unsqueeze(2), x[:, 1::2].unsqueeze(1), dim=-1)
    torch.testing.assert_close(found, 0.5 * (1.0 + cosines))
    other = attraction(x, received.flip(1), size.flip(1), 0, only).exp()
    torch.testing.assert_close(found, other)


def test_patches_that_are_attended_to_stay_alone() -> None:
    x = torch.ones(1, 8, 3) + 0.1 * torch.randn(1, 8, 3)
    received = torch.tensor([[0.3, 0.3, 0.1, 0.02, 0.02, 0.1, 0.3, 0.3]])
    scores = attraction(x, received, torch.ones(1, 8), 0, load_method("mctf", tau_info=50.0))
    merges = bidirectional_match(scores, 2, 0, prefix=0)
    fused = set(merges.gone[0].tolist()) | set(merges.kept.gather(1, merges.into)[0].tolist())
    assert fused == {2, 3, 4}  # 4 into 3, of A and B what is seen least; then 3 into 2


def test_large_tokens_stay_alone() -> None:
    x, received = torch.ones(1, 8, 3), torch.ones(1, 8)
    size = torch.tensor([[9.0, 9, 1, 1, 1, 1, 9, 9]])
    scores = attraction(x, received, size, 0, load_method("mctf", tau_size=1.0))
    merges = bidirectional_match(scores, 2, 0, prefix=0)
    fused = set(merges.gone[0].tolist()) | set(merges.kept.gather(1, merges.into)[0].tolist())
    assert fused <= {2, 3, 4, 5}


def test_opposite_patches_are_the_last_to_fuse() -> None:
    """The least similarity there is has a logarithm, and comes last."""
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    one = torch.ones(1, 2)
    scores = attraction(x, one, one, 0, load_method("mctf", tau_sim=0.5))
    assert torch.isfinite(scores).all()
    assert scores.item() < -10.0


def test_a_patch_goes_on_with_those_it_took_in() -> None:
    """A's 0 goes into B's 1, which goes into A's 2: all three are one, and 3 is left."""
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])  # of A's 0 and 2 with B's 1 and 3
    merges = bidirectional_match(scores, 2, 0, prefix=0)
    assert merges.kept.tolist() == [[2, 3]]
    assert sorted(zip(merges.gone[0].tolist(), merges.into[0].tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
    ]


@pytest.mark.parametrize("option", ["tau_sim", "tau_info", "tau_size"])
def test_a_negative_exponent_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} of mctf is -1; give a number, at least"):
        load_method("mctf", **{option: -1})
