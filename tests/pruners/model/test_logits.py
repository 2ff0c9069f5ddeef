from __future__ import annotations

import copy

import torch

from pruners.model.logits import fold_keys
from pruners.model.surgery import keep_qk_dims


def logits(attn, x):
    mixed = attn.mix(x, None, None)
    return mixed.query @ mixed.key.transpose(-2, -1)


def test_it_is_exact_where_the_keys_that_went_follow_from_those_that_stay(tiny) -> None:
    # k_R = A k_K + c in one head, whatever q is: the softmax does not see c.
    attn = tiny().double().blocks[0].attn
    width = attn.heads * attn.qk_dim
    kept = torch.tensor([[0, 2, 3, 5], [1, 2, 6, 7], [0, 1, 2, 3]])
    with torch.no_grad():
        for head, dims in enumerate(kept):
            start = width + head * attn.qk_dim
            gone = [d for d in range(attn.qk_dim) if d not in dims]
            mix = torch.randn(len(gone), len(dims), dtype=torch.float64)
            weight, bias = attn.qkv.weight, attn.qkv.bias
            weight[start + torch.tensor(gone)] = mix @ weight[start + dims]
            bias[start + torch.tensor(gone)] = torch.randn(len(gone), dtype=torch.float64)
    x = torch.randn(4, 9, 24, dtype=torch.float64)
    cut, rows = copy.deepcopy(attn), kept + torch.arange(3).unsqueeze(1) * attn.qk_dim
    keep_qk_dims(cut, kept)
    masked = logits(cut, x).softmax(-1)
    assert fold_keys(cut, attn, rows, [x[:2], x[2:]], 1e-12)
    wanted = logits(attn, x).softmax(-1)
    assert torch.allclose(logits(cut, x).softmax(-1), wanted, atol=1e-7)
    assert not torch.allclose(masked, wanted, atol=1e-2)


def test_the_logits_come_closer_and_padding_stays_zero(tiny) -> None:
    attn = tiny().blocks[0].attn
    x = torch.randn(6, 9, 24)
    cut, kept = copy.deepcopy(attn), torch.tensor([[0, 2, 3, 5]] * 3)
    rows = kept + torch.arange(3).unsqueeze(1) * attn.qk_dim
    keep_qk_dims(cut, kept)
    with torch.no_grad():
        cut.qkv.weight[3] = 0.0  # the last q and k dim of the first head are padding
        cut.qkv.weight[12 + 3] = 0.0
    rows[0, 3] = -1

    def error() -> float:
        lost = logits(attn, x) - logits(cut, x)
        return (lost - lost.mean(-1, keepdim=True)).square().mean().item()

    before = error()
    assert fold_keys(cut, attn, rows, [x], 1e-3)
    assert error() < before
    assert bool((cut.qkv.weight[[3, 15]] == 0.0).all())
