from __future__ import annotations

import torch

from pruners.model.numbered import numbered, positions_of, query_rows
from pruners.model.surgery import keep_heads, keep_qk_dims, keep_ragged_dims


def test_every_parameter_holds_its_own_positions(tiny) -> None:
    vit = tiny()
    for own, numbers in zip(vit.parameters(), numbered(vit).parameters(), strict=True):
        assert torch.equal(positions_of(numbers).flatten(), torch.arange(own.numel()))


def test_query_rows_of_cut_heads_and_dims(tiny) -> None:
    vit = tiny()
    marks = numbered(vit)
    keep_heads(marks.blocks[0].attn, torch.tensor([0, 2]))
    keep_qk_dims(marks.blocks[0].attn, torch.tensor([[1, 3], [0, 7]]))
    rows = query_rows(marks, vit)
    assert rows[0].tolist() == [[1, 3], [16, 23]]
    assert rows[1].tolist() == torch.arange(24).view(3, 8).tolist()


def test_query_rows_of_padding_are_none(tiny) -> None:
    vit = tiny()
    marks = numbered(vit)
    kept = torch.zeros(3, 8, dtype=torch.bool)
    kept[0, :2] = kept[2, 4] = True
    with torch.no_grad():
        keep_ragged_dims(marks.blocks[1].attn, kept, kept)
    assert query_rows(marks, vit)[1].tolist() == [[0, 1], [20, -1]]
