"""Picture of X-Pruner's class-wise masks: the units that serve each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from search.report.class_changes import class_names, label
from search.report.drawing import INK, blank, plain

ROWS, COLUMNS = 60, 900
"""Most cells of a panel; larger masks are averaged."""

_KINDS = {"head": "heads", "neuron": "neurons"}
_NAMED = 30  # classes, up to which each row has its name
_GAP = 0.012  # of a panel's width, between two blocks

Masks = NDArray[np.float64]


def draw_units(masks: Mapping[str, Masks], classes: Sequence[str] = ()) -> Figure:
    """Draw masks per class: a panel for heads and one for neurons, block beside block.

    In each block the units stand in the order of the class that they serve most.

    Args:
        masks: Site ("blocks.3.mlp.neuron") -> [classes, units].
        classes: Names of the classes; empty if they have none.

    Raises:
        ValueError: If there are no heads and no neurons among the sites.
    """
    panels = {kind: found for kind in _KINDS if (found := _of_kind(masks, kind))}
    if not panels:
        raise ValueError(f"masks are of {list(masks)}; give sites of heads or neurons")
    count = next(iter(masks.values())).shape[0]
    rows = min(count, ROWS)
    figure = blank(12, len(panels) * (0.8 + max(1.6, 0.16 * rows if count <= _NAMED else 3.2)))
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (kind, blocks) in zip(grid, panels.items(), strict=True):
        sorted_blocks = {block: mask[:, by_class_served(mask)] for block, mask in blocks.items()}
        _draw_panel(figure, axes, kind, sorted_blocks)
        _name_rows(axes, class_names(classes, count), rows)
    return figure


def by_class_served(mask: Masks) -> NDArray[np.intp]:
    """Return the order of a mask's units [classes, units]: by the class with the largest value.

    Among the units of a class those come first whose value stands out most.
    """
    return np.lexsort((mask.mean(axis=0) - mask.max(axis=0), mask.argmax(axis=0)))


def binned(mask: Masks, rows: int, columns: int) -> Masks:
    """Average a matrix into at most so many rows and columns."""
    for axis, most in enumerate((rows, columns)):
        size = mask.shape[axis]
        if size > most:
            starts = np.arange(most) * size // most
            widths = np.diff([*starts, size])
            sums = np.add.reduceat(mask, starts, axis=axis)
            mask = sums / np.expand_dims(widths, 1 - axis)
    return mask


def _draw_panel(figure: Figure, axes: Axes, kind: str, blocks: Mapping[int, Masks]) -> None:
    units = sum(mask.shape[1] for mask in blocks.values())
    share = min(1.0, COLUMNS / units)
    count = next(iter(blocks.values())).shape[0]
    cells = {
        block: binned(mask, ROWS, max(1, round(share * mask.shape[1])))
        for block, mask in blocks.items()
    }
    total = sum(cell.shape[1] for cell in cells.values())
    gap = max(1, round(_GAP * total)) if len(cells) < total else 1
    low, high = np.percentile(np.concatenate([c.ravel() for c in cells.values()]), [1, 99])
    left, ticks = 0.0, []
    for block, cell in cells.items():
        width = cell.shape[1]
        image = _image(axes, cell, left, low, high)
        ticks.append((left + width / 2, block))
        left += width + gap
    axes.set_xlim(0, left - gap)
    axes.set_ylim(cell.shape[0], 0)
    axes.set_xticks([x for x, _ in ticks], [str(block) for _, block in ticks], fontsize=8)
    axes.set_xlabel("block", fontsize=8)
    averaged = [
        f"{size} {name} averaged into {shown}"
        for size, shown, name in ((count, cell.shape[0], "classes"), (units, total, _KINDS[kind]))
        if shown < size
    ]
    title = ": ".join([_KINDS[kind], "; ".join(averaged)]) if averaged else _KINDS[kind]
    plain(axes)
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.015, pad=0.01)
    bar.set_label("mask", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)


def _image(axes: Axes, cells: Masks, left: float, low: float, high: float) -> AxesImage:
    rows, columns = cells.shape
    return axes.imshow(
        cells,
        cmap="viridis",
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
        extent=(left, left + columns, rows, 0),
    )


def _name_rows(axes: Axes, names: Sequence[str], rows: int) -> None:
    """Name each row, or of many rows some, by the first class in it."""
    axes.set_ylabel("class", fontsize=8, color=INK)
    step = 1 if rows <= _NAMED else rows // 10
    shown = range(0, rows, step)
    first = [row * len(names) // rows for row in shown]
    axes.set_yticks([r + 0.5 for r in shown], [label(names[i]) for i in first], fontsize=7)


def _of_kind(masks: Mapping[str, Masks], kind: str) -> dict[int, Masks]:
    """Return block -> mask of one kind of unit, first block first."""
    found = {
        int(site.split(".")[1]): mask for site, mask in masks.items() if site.endswith(f".{kind}")
    }
    return {block: found[block] for block in sorted(found)}
