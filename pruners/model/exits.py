"""Exits: classifiers behind an earlier block, which become a model's own where the rest goes.

Plug-in classifiers of F. Yu et al. (2022), "Width & Depth Pruning for Vision Transformers", AAAI.
"""

from __future__ import annotations

import copy

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Exit(nn.Module):
    """A classifier like a model's own, norm included, with first weights of its own."""

    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Module
    head_dist: nn.Module

    def __init__(self, vit: VisionTransformer) -> None:
        """Copy the structure of a model's own, not the weights."""
        super().__init__()
        for name in ("norm", "fc_norm", "head", "head_dist"):
            if hasattr(vit, name):
                self.add_module(name, copy.deepcopy(getattr(vit, name)))
        for part in self.children():
            if isinstance(part, nn.Linear | nn.LayerNorm | nn.RMSNorm):
                part.reset_parameters()

    def forward(self, x: Tensor, vit: VisionTransformer) -> Tensor:
        """Return logits [B, classes] of tokens [B, N, D], which `vit` pools."""
        x = self.norm(x)
        if not hasattr(self, "head_dist"):
            return self.head(vit.head_drop(self.fc_norm(vit.pool(x))))
        own, distilled = self.head(vit.head_drop(x[:, 0])), self.head_dist(vit.head_drop(x[:, 1]))
        return (own + distilled) / 2
