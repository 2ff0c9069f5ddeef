"""First-order Taylor saliency |w * dL/dw| (Molchanov et al., 2019, arXiv:1906.10771, eq. 8).

The paper squares the product; the ranking within a batch is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from pruners.families.options import option
from pruners.families.weight import WeightPruner
from pruners.model.types import Batches, Scores
from pruners.model.vit import ViT
from pruners.saliency.gradients import batch_gradients


@dataclass(frozen=True, kw_only=True)
class Taylor(WeightPruner):
    """Mean over mini-batches of |w * dL/dw|.

    The absolute value is taken per mini-batch, so that contributions of different batches do not
    cancel: at a minimum of the training loss the mean gradient itself is close to zero.

    Attributes:
        num_batches: Mini-batches to average over.
    """

    num_batches: int = option(8, low=1)

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Return the saliency of each weight.

        Raises:
            ValueError: If there are no batches.
        """
        layers = dict(vit.linears())
        totals = {k: torch.zeros_like(v.weight, dtype=torch.float32) for k, v in layers.items()}
        seen = 0
        for gradients in batch_gradients(vit, islice(batches, self.num_batches)):
            seen += 1
            for site, gradient in gradients.items():
                totals[site] += (layers[site].weight.detach() * gradient).float().abs()
        if not seen:
            raise ValueError("taylor got no batches; give at least one")
        return {site: total / seen for site, total in totals.items()}
