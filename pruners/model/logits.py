"""Attention logits after q/k dims were cut: what the ones that went have said is folded into q.

The removed dims of k are predicted from those that stay in the same head, k_R ~ A k_K (up to a
constant per image, which the softmax does not see), so that

    q k^T = q_K k_K^T + q_R k_R^T ~ (q_K + q_R A) k_K^T,

and q_K + q_R A is a linear map of what q is made of. CORP (2026, arXiv:2602.05243) fits logits too;
there the map acts on q_K alone, here on all of q: it is exact for any q where k_R is an affine
function of k_K.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pruners.model.attention import Attention
from pruners.model.least_squares import Moments, ridge


@torch.no_grad()
def fold_keys(
    cut: Attention, whole: Attention, rows: Tensor, inputs: Iterable[Tensor], damping: float
) -> bool:
    """Change the q rows of an attention whose q/k dims were cut, in place.

    Args:
        cut: The attention, cut.
        whole: As it was.
        rows: [H', K'], which q row of `whole` each q row of `cut` was; -1 in the padding of heads.
        inputs: What they read, [B, N, D] each.
        damping: Relative damping.

    Returns:
        Whether the systems could be solved.
    """
    width = whole.heads * whole.qk_dim
    keys = whole.qkv.weight[width : 2 * width]
    moments = Moments()
    for x in inputs:
        k = x @ keys.T  # a bias is the same for all tokens
        k = (k - k.mean(dim=1, keepdim=True)).flatten(0, 1)
        moments.add(k)
    covariance, _ = moments.covariances()  # [H * K, H * K]
    for head, own in enumerate(rows.to(covariance.device)):
        kept = own[own >= 0]
        first = kept[0] // whole.qk_dim * whole.qk_dim
        dims = torch.arange(first, first + whole.qk_dim, device=kept.device)
        gone = dims[~torch.isin(dims, kept)]
        fit = ridge(covariance[kept][:, kept], covariance[gone][:, kept], damping)  # A
        if fit is None:
            return False
        places = head * cut.qk_dim + (own >= 0).nonzero().flatten()
        fit = fit.T.to(whole.qkv.weight)
        cut.qkv.weight[places] += fit @ whole.qkv.weight[gone]
        if cut.qkv.bias is not None:
            cut.qkv.bias[places] += fit @ whole.qkv.bias[gone]
    return True
