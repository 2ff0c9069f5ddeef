from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from search.data.augment import Epoch, Views, crop_and_flip, draw_views

ROWS = np.arange(100_000)


def test_every_image_is_a_shift_or_mirrored_shift_of_itself() -> None:
    images = torch.randint(1, 256, (40, 3, 7, 5), dtype=torch.uint8)
    views = draw_views(Epoch(0), ROWS[:40], padding=2)
    out = crop_and_flip(images, views, padding=2)
    padded = F.pad(images, (2, 2, 2, 2))
    found = [_matches(before, after) for before, after in zip(padded, out, strict=True)]
    assert found == [[view] for view in zip(*(part.tolist() for part in views), strict=True)]
    seen = {match for (match,) in found}
    assert len(seen) > 20  # of 50; they are not all alike
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def _matches(padded: torch.Tensor, after: torch.Tensor) -> list[tuple[int, int, bool]]:
    found = []
    for top in range(5):
        for left in range(5):
            cut = padded[:, top : top + 7, left : left + 5]
            found += [(top, left, False)] * torch.equal(after, cut)
            found += [(top, left, True)] * torch.equal(after, cut.flip(2))
    return found


def test_no_padding_only_mirrors() -> None:
    images = torch.rand(30, 2, 4, 3)
    views = draw_views(Epoch(0), ROWS[:30], padding=0)
    out = crop_and_flip(images, views, padding=0)
    for before, after, mirrored in zip(images, out, views.mirrored, strict=True):
        assert torch.equal(after, before.flip(2) if mirrored else before)
    assert set(views.mirrored.tolist()) == {False, True}


def _scrambled(x: int) -> int:
    """SplitMix64's output function on Python's own numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@given(
    seed=st.integers(0, 2**70),
    number=st.integers(0, 10_000),
    rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    padding=st.integers(0, 60),
)
def test_draws_are_those_of_splitmix64(
    seed: int, number: int, rows: list[int], padding: int
) -> None:
    golden = 0x9E3779B97F4A7C15
    # The generator's published first outputs from state 0 (Vigna's splitmix64.c).
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_scrambled(i * golden % 2**64) for i in (1, 2, 3)] == published
    start = _scrambled((seed + golden) % 2**64)
    key = _scrambled((start + number * golden) % 2**64)
    views = draw_views(Epoch(seed, number), np.array(rows), padding)
    for index, row in enumerate(rows):
        bits = _scrambled((key + row * golden) % 2**64)
        high, middle = bits >> 33, bits >> 2 & (2**31 - 1)
        assert views.top[index] == high * (2 * padding + 1) // 2**31
        assert views.left[index] == middle * (2 * padding + 1) // 2**31
        assert views.mirrored[index] == bits % 2


def _codes(views: Views, choices: int) -> np.ndarray:
    return (views.top * choices + views.left) * 2 + views.mirrored


def _excess(counts: np.ndarray) -> float:
    """Chi-square of equal chances, in standard deviations above its mean."""
    expected = counts.sum() / counts.size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return (chi2 - freedom) / np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [1, 4, 28])
def test_all_views_are_equally_likely_over_images_and_over_epochs(padding: int) -> None:
    choices = 2 * padding + 1
    over_images = draw_views(Epoch(3, 1), ROWS, padding)
    drawn = [draw_views(Epoch(3, number), ROWS[7:8], padding) for number in range(20_000)]
    over_epochs = Views(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))
    for views in (over_images, over_epochs):
        codes = _codes(views, choices)  # jointly, so that the three are independent too
        assert abs(_excess(np.bincount(codes, minlength=2 * choices**2))) < 5.0
        for part, count in ((views.top, choices), (views.left, choices), (views.mirrored, 2)):
            assert abs(_excess(np.bincount(part, minlength=count))) < 5.0


@pytest.mark.parametrize(
    ("first", "second", "shift"),
    [
        (Epoch(0, 1), Epoch(0, 1), 1),  # neighbours in one epoch
        (Epoch(0, 1), Epoch(0, 2), 0),  # an image in two epochs
        (Epoch(0, 1), Epoch(1, 1), 0),  # and with two seeds
        (Epoch(0, 1), Epoch(1, 0), 0),  # seed and epoch do not just add up
        (Epoch(2, 0), Epoch(2, 1), 1),
    ],
)
def test_images_epochs_and_seeds_are_independent(first: Epoch, second: Epoch, shift: int) -> None:
    one = _codes(draw_views(first, ROWS, 1), 3)
    other = _codes(draw_views(second, ROWS + shift, 1), 3)
    assert abs(_excess(np.bincount(one * 18 + other, minlength=18 * 18))) < 5.0


@given(
    order=st.permutations(list(range(60))),
    cuts=st.lists(st.integers(1, 59), unique=True, max_size=5),
)
def test_order_and_batches_do_not_matter(order: list[int], cuts: list[int]) -> None:
    images = torch.arange(60 * 30).view(60, 1, 6, 5)
    whole = crop_and_flip(images, draw_views(Epoch(5, 2), ROWS[:60], 2), 2)
    for part in np.split(np.array(order), sorted(cuts)):
        views = draw_views(Epoch(5, 2), part, 2)
        assert torch.equal(crop_and_flip(images[part], views, 2), whole[part])
