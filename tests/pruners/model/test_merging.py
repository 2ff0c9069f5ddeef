from __future__ import annotations

import pytest
import torch

from pruners.model.merging import Merges, token_sizes, unit_vectors

# Of tokens 0 to 5, tokens 4 and 1 go into token 5, token 2 into token 0; token 3 is left alone.
KEPT, GONE, INTO = [[3, 5, 0]], [[4, 1, 2]], [[1, 1, 2]]
GROUPS = ([3], [5, 4, 1], [0, 2])


def merges(images: int = 1) -> Merges:
    kept, gone, into = (torch.tensor(each).expand(images, -1) for each in (KEPT, GONE, INTO))
    return Merges(kept=kept, gone=gone, into=into)


@pytest.mark.parametrize("weighted", [True, False])
def test_merged_tokens_are_weighted_means(weighted: bool) -> None:
    x, size = torch.randn(2, 6, 4), torch.tensor([[1.0, 3, 1, 2, 5, 1], [2.0, 1, 1, 1, 1, 4]])
    weight = torch.rand(2, 6) + 0.1 if weighted else None
    merged, sizes = merges(2).merge(x, size, weight)
    counted = size if weight is None else weight
    for image in range(2):
        for place, group in enumerate(GROUPS):
            parts = [(counted[image, i].item(), x[image, i]) for i in group]
            mean = sum(w * row for w, row in parts) / sum(w for w, _ in parts)
            torch.testing.assert_close(merged[image, place], mean)
            assert sizes[image, place] == size[image, group].sum()
    assert torch.equal(merged[:, 0], x[:, 3])  # bit for bit


def test_half_precision_stays_half_with_weights_in_float32() -> None:
    x = torch.randn(1, 6, 4, dtype=torch.bfloat16)
    merged, sizes = merges().merge(x, token_sizes(x, None), torch.rand(1, 6) + 0.1)
    assert merged.dtype == sizes.dtype == torch.bfloat16
    assert sizes.tolist() == [[1.0, 3.0, 2.0]]


def test_products_of_unit_vectors_are_cosines() -> None:
    vectors = torch.randn(3, 5).to(torch.bfloat16)
    unit = unit_vectors(vectors)
    assert unit.dtype == torch.float32
    cosine = torch.cosine_similarity(vectors.double()[0], vectors.double()[1], dim=0)
    assert (unit[0] @ unit[1]).item() == pytest.approx(cosine.item(), abs=1e-6)
    assert unit_vectors(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
