"""What passes between models and methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images [B, channels, height, width], normalised, and labels [B]."""

Scores = dict[str, Tensor]
"""Site -> one score per unit or weight; higher is kept."""

Thresholds = Mapping[str, float]
"""Site -> share of its units to cut; a site that is absent is not cut."""
