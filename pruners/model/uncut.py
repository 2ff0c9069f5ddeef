"""What a model was before its units were cut: what the weights that stay are solved toward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruners.model.numbered import numbered, query_rows
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Uncut:
    """A model as it was before its units were cut.

    Attributes:
        vit: A copy of it.
        query_rows: See `pruners.model.numbered.query_rows`; empty if no q/k dims go.
        channels: The residual channels that stay, [D']; None if all do.
        aim: The model whose streams are aimed at; None for `vit` itself.
    """

    vit: ViT
    query_rows: list[Tensor] = field(default_factory=list)
    channels: Tensor | None = None
    aim: ViT | None = None

    @classmethod
    def of(cls, vit: ViT, cut: Callable[[ViT], None], *, narrows_queries: bool) -> Uncut:
        """Remember a model that is not cut yet.

        Args:
            vit: The model.
            cut: Cuts a model in place, as this one will be.
            narrows_queries: Whether q/k dims go.
        """
        rows: list[Tensor] = []
        if narrows_queries:
            marks = numbered(vit)
            with torch.no_grad():
                cut(marks)
            rows = query_rows(marks, vit)
        return cls(vit=copy.deepcopy(vit), query_rows=rows)
