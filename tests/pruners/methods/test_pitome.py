from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pruners import load_method
from pruners.methods.pitome import MergeRedundant, energy, ordered_match
from pruners.methods.tome import MergeSimilar
from pruners.model.attention import Attended
from pruners.model.merging import unit_vectors
from pruners.model.tokens import Tokens


def attended(keys: Tensor) -> Attended:
    """Attention that has only keys, of two heads that differ and whose mean is [B, N, K]."""
    apart = torch.randn_like(keys)
    both = torch.stack([keys + apart, keys - apart], dim=1)
    return Attended(output=keys, query=both, key=both)


def energies_by_loops(keys: Tensor, margin: float) -> list[float]:
    """Energies of patches [P, K], in float64, as the authors' code has them."""
    found = []
    for own in keys.double():
        total = 0.0
        for other in keys.double():
            over = (own @ other / (own.norm() * other.norm())).item() - margin
            total += over if over >= 0.0 else math.expm1(over)
        found.append(total / len(keys))
    return found


@pytest.mark.parametrize("margin", [-0.3, 0.0, 0.4, 0.75])
def test_energies_are_the_papers(margin: float) -> None:
    keys = torch.randn(3, 11, 6)
    unit = unit_vectors(keys)
    found = energy(unit @ unit.transpose(1, 2), margin)
    for image in range(3):
        assert found[image].tolist() == pytest.approx(
            energies_by_loops(keys[image], margin), abs=1e-6
        )


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("merged", [1, 3, 4])
def test_the_matching_is_the_papers(prefix: int, merged: int) -> None:
    """Written out with loops in float64."""
    patches, margin = 9, 0.3
    keys, x = torch.randn(4, prefix + patches, 5), torch.randn(4, prefix + patches, 3)
    size = torch.randint(1, 4, (4, prefix + patches)).float()
    out = MergeRedundant(prefix, 5, merged, margin)(Tokens(x, size), attended(keys), 1.0)
    for image in range(4):
        own = keys[image, prefix:].double()
        energies = energies_by_loops(own, margin)
        order = sorted(range(patches), key=lambda i: -energies[i])
        a, b, protected = order[: 2 * merged : 2], order[1 : 2 * merged : 2], order[2 * merged :]
        groups = {j: [j] for j in b}
        for i in a:
            cosines = {j: torch.cosine_similarity(own[i], own[j], dim=0).item() for j in b}
            groups[max(cosines, key=cosines.__getitem__)].append(i)
        expected = [[i] for i in protected] + list(groups.values())
        for place, group in enumerate(expected):
            rows, counts = x[image, prefix:][group], size[image, prefix:][group]
            mean = (rows * counts.unsqueeze(1)).sum(0) / counts.sum()
            torch.testing.assert_close(out.x[image, prefix + place], mean)
            assert out.size[image, prefix + place] == counts.sum()


def test_unique_patches_are_protected_and_a_crowd_becomes_its_mean() -> None:
    """Six patches of one kind among four that resemble none; ToMe gives no such guarantee."""
    crowd, lone = [0, 2, 3, 6, 8, 9], [1, 4, 5, 7]
    keys = torch.zeros(1, 10, 5)
    keys[0, crowd, 0] = 1.0
    for axis, patch in enumerate(lone, start=1):
        keys[0, patch, axis] = 2.0
    x = torch.arange(10.0).reshape(1, 10, 1).pow(2)
    merged = MergeRedundant(0, 5, 3, 0.5)(Tokens(x), attended(keys), 1.0)
    assert sorted(merged.x[0, :4, 0].tolist()) == [patch**2 for patch in lone]
    assert merged.size[0, :4].tolist() == [1.0] * 4
    total = (merged.x[0, 4:, 0] * merged.size[0, 4:]).sum()
    assert total == sum(patch**2 for patch in crowd)
    # With 5 to merge there is nobody left to protect. ToMe, asked for 3, has to take what A holds.
    tome = MergeSimilar(0, 5, 5)(Tokens(x), attended(keys), 1.0)
    assert not {patch**2 for patch in lone} <= set(tome.x[0, :, 0].tolist())


def test_two_pairs_in_closed_form() -> None:
    """Patches at angles 0 and 10, 90 and 110 degrees, and two at 200 and 290: one merge."""
    angles = torch.tensor([0.0, 200.0, 90.0, 10.0, 290.0, 110.0]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0)
    cosines = keys @ keys.transpose(1, 2)
    # With the margin at 0.95 only the first pair, cos 10 degrees = 0.985, counts as alike.
    found = energy(cosines, 0.95)[0]
    expected = [
        sum(
            c - 0.95 if c >= 0.95 else math.exp(c - 0.95) - 1.0
            for c in (math.cos(one - other) for other in angles.tolist())
        )
        / 6
        for one in angles.tolist()
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    merges = ordered_match(keys, 1, 0.95, prefix=0)
    first, second = sorted(range(6), key=lambda i: -expected[i])[:2]
    assert (merges.gone.item(), merges.kept[0, -1].item()) == (first, second)


def test_the_choice_does_not_depend_on_where_patches_lie() -> None:
    """A and B follow from the energies; ToMe's follow from the positions."""
    keys, x = torch.randn(1, 12, 6), torch.randn(1, 12, 2)
    shuffled = torch.randperm(12)

    def rows(reducer, places: Tensor) -> set[tuple[float, ...]]:
        out = reducer(Tokens(x[:, places]), attended(keys[:, places]), 1.0)
        return {tuple(round(v, 4) for v in row) for row in out.x[0].tolist()}

    assert rows(MergeRedundant(0, 6, 4, 0.4), shuffled) == rows(
        MergeRedundant(0, 6, 4, 0.4), torch.arange(12)
    )
    assert rows(MergeSimilar(0, 6, 4), shuffled) != rows(MergeSimilar(0, 6, 4), torch.arange(12))


def test_the_margin_falls_with_depth(tiny) -> None:
    shape = tiny(depth=4, img_size=(48, 32)).shape()
    pitome = load_method("pitome", margin=0.8)
    reducers = pitome.reducers(shape, {"blocks.0.token": 0.2, "blocks.3.token": 0.2})
    assert [reducers[i].margin for i in (0, 3)] == pytest.approx([0.8, 0.2])


def test_a_margin_beyond_a_cosine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"option margin of pitome is 1\.5; give a number, from"):
        load_method("pitome", margin=1.5)
