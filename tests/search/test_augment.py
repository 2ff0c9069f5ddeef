from __future__ import annotations

import torch
import torch.nn.functional as F

from search.augment import crop_and_flip


def test_every_image_is_a_shift_or_mirrored_shift_of_itself() -> None:
    images = torch.randint(1, 256, (40, 3, 7, 5), dtype=torch.uint8)
    out = crop_and_flip(images, padding=2, generator=torch.Generator().manual_seed(0))
    padded = F.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, out, strict=True):
        matches = _matches(before, after)
        assert len(matches) == 1
        seen.add(matches[0])
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


def test_the_generator_decides() -> None:
    images = torch.rand(8, 1, 6, 6)
    first, again, other = (
        crop_and_flip(images, 1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_padding_only_mirrors() -> None:
    images = torch.rand(30, 2, 4, 3)
    out = crop_and_flip(images, 0, torch.Generator().manual_seed(0))
    flipped = [torch.equal(o, i.flip(2)) for o, i in zip(out, images, strict=True)]
    same = [torch.equal(o, i) for o, i in zip(out, images, strict=True)]
    assert all(f or s for f, s in zip(flipped, same, strict=True))
    assert any(flipped)
    assert any(same)
