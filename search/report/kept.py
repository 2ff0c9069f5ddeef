"""Shares of each block that plans keep, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from search.records.front import Front, cost_ratio
from search.report.drawing import INK, blank, cell_text, plain, spread
from search.report.progress import top1_text

PANELS = {
    "heads": "units: heads",
    "neurons": "units: neurons",
    "tokens": "tokens",
    "weights": "weights",
}
"""Panels of a picture, and their titles: the family of methods, and the kind of unit it cuts."""

MOST = 15
"""Members of a front that a picture shows."""

_FEW = 6  # blocks, up to which the panels stand side by side
_COLORS = "YlGnBu"


def draw_kept(front: Front) -> Figure:
    """Draw the shares of each block that members keep: heads, neurons, tokens and weights.

    A member's label gives the width of its residual stream, if that is cut.
    """
    members = spread(front.members, MOST) or [front.dense]
    blocks = len(front.dense.shape["blocks"])
    columns = len(PANELS) if blocks <= _FEW else 2
    rows = len(PANELS) // columns
    figure = blank(
        2.4 + columns * (0.3 + 0.27 * max(5, blocks)), rows * (0.9 + 0.22 * max(3, len(members)))
    )
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        kept = np.stack([kept_shares(m.shape, front.dense.shape)[panel] for m in members])
        image = _table(figure, axes, kept)
        axes.set_xticks(range(blocks), map(str, range(blocks)), fontsize=7)
        axes.tick_params(length=0)
        plain(axes)
        axes.set_title(PANELS[panel], fontsize=9, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("block", fontsize=8)
    for axes in grid[:, 0]:
        labels = [
            f"{m.trial}  {cost_ratio(front, m):.2f}x  {top1_text(m)} %"
            f"{_width(m.shape, front.dense.shape)}"
            for m in members
        ]
        axes.set_yticks(range(len(members)), labels, fontsize=8)
    bar = figure.colorbar(image, ax=grid, fraction=0.02, pad=0.01, aspect=30)
    bar.set_label("kept (%)", fontsize=8, color=INK)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "50", "all"], fontsize=8, color=INK)
    if len(members) < len(front.members):
        figure.suptitle(f"{len(members)} of {len(front.members)} members", fontsize=9, color=INK)
    return figure


def draw_plan(shape: Mapping[str, Any], dense: Mapping[str, Any]) -> Figure:
    """Draw the shares of each block that one plan keeps.

    It is small, and laid out by hand: a sweep draws one for each trial.

    Args:
        shape: Shape that the plan makes, as JSON values.
        dense: The dense model's.
    """
    shares = kept_shares(shape, dense)
    kept = np.stack([shares[panel] for panel in PANELS])
    blocks = kept.shape[1]
    width, height, left, bottom = 0.9 + 0.3 * max(6, blocks), 1.6, 0.75, 0.3
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.3) / height)
    )
    _table(figure, axes, kept)
    axes.set_axis_off()  # ticks would take half of the time
    for row, panel in enumerate(PANELS):
        cell_text(figure, axes, -0.7, row, panel, INK, ha="right")
    for block in range(blocks):
        cell_text(figure, axes, block, len(PANELS) - 0.2, str(block), INK)
    cell_text(figure, axes, -0.7, len(PANELS) - 0.2, "block", INK, ha="right")
    title = f"kept (%; dark: all){_width(shape, dense)}"
    cell_text(figure, axes, -0.5, -0.8, title, INK, ha="left")
    return figure


def kept_shares(
    shape: Mapping[str, Any], dense: Mapping[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """Return, for each block, the shares of the dense model's units, tokens and weights left.

    Heads count with the width of their values; weights are the share, of the weights that surgery
    left, which is not masked.
    """
    shares: dict[str, list[float]] = {panel: [] for panel in PANELS}
    for index, (block, whole) in enumerate(zip(shape["blocks"], dense["blocks"], strict=True)):
        shares["heads"].append(
            _ratio(block["heads"] * block["v_dim"], whole["heads"] * whole["v_dim"])
        )
        shares["neurons"].append(_ratio(block["hidden"], whole["hidden"]))
        shares["tokens"].append(_ratio(block["mlp_tokens"], whole["mlp_tokens"]))
        shares["weights"].append(_density(shape, block, index))
    return {panel: np.array(values) for panel, values in shares.items()}


def _width(shape: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Say the share of the residual stream's channels that is left; empty if all are."""
    share = _ratio(shape["dim"], dense["dim"])
    return f"; width {100 * share:.0f}" if share < 1.0 else ""


def _density(shape: Mapping[str, Any], block: Mapping[str, Any], index: int) -> float:
    inner, dim = block["heads"] * block["v_dim"], shape["dim"]
    sizes = {
        f"blocks.{index}.attn.qkv": dim * (2 * block["heads"] * block["qk_dim"] + inner),
        f"blocks.{index}.attn.proj": block["attn_out"] * inner,
        f"blocks.{index}.mlp.fc1": dim * block["hidden"],
        f"blocks.{index}.mlp.fc2": block["mlp_out"] * block["hidden"],
    }
    nonzero = sum(shape["nonzero"].get(site, size) for site, size in sizes.items() if size)
    return _ratio(nonzero, sum(sizes.values()))


def _table(figure: Figure, axes: Axes, kept: NDArray[np.float64]) -> AxesImage:
    """Draw shares [rows, blocks] as coloured cells, with percentages but for those of 100."""
    image = axes.imshow(kept, cmap=_COLORS, vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), share in np.ndenumerate(kept):
        if (text := f"{100 * share:.0f}") != "100":
            cell_text(figure, axes, column, row, text, "white" if share > 0.6 else "black")
    return image


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
