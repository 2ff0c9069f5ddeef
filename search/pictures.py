"""Pictures of a front: an interactive plot, a still one, and what was kept of each block."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from search.progress import cost_ratio
from search.results import Front, TrialRecord, cost_of_record

FRONT, REST, DENSE = "#d1495b", "#9aa5b1", "#1f2933"
AXIS = {
    "effective_gmacs": "effective GMACs (MACs on weights that are not zero)",
    "gmacs": "GMACs",
    "latency": "milliseconds per image",
}
PANELS = ("heads", "neurons", "tokens", "weights")


def front_html(front: Front, records: Sequence[TrialRecord]) -> str:
    """Return a self-contained page with an interactive plot of top-1 against cost."""
    figure = go.Figure()
    figure.add_trace(_scatter(front, _dominated(front, records), "dominated", REST, "markers", 8))
    figure.add_trace(_scatter(front, list(front.members), "front", FRONT, "lines+markers", 11))
    figure.add_trace(_scatter(front, [front.dense], "dense", DENSE, "markers", 13, symbol="star"))
    figure.update_layout(
        template="plotly_white",
        margin={"l": 55, "r": 15, "t": 40, "b": 50},
        title={"text": f"hypervolume {front.hypervolume:.4f}", "font": {"size": 14}},
        legend={"y": 0.02, "x": 0.98, "xanchor": "right", "yanchor": "bottom"},
        hoverlabel={"align": "left"},
        autosize=True,
    )
    figure.update_xaxes(title_text=AXIS[front.cost])
    figure.update_yaxes(title_text="validation top-1 (%)")
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config={"responsive": True}))


def front_png(front: Front, records: Sequence[TrialRecord], path: Path) -> None:
    """Draw top-1 against cost."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    rest = _dominated(front, records)
    axes.scatter(*_xy(front, rest), s=28, color=REST, label="dominated")
    axes.plot(*_xy(front, front.members), "o-", color=FRONT, label="front", zorder=3)
    axes.scatter(
        *_xy(front, [front.dense]), marker="*", s=150, color=DENSE, label="dense", zorder=3
    )
    for member in front.members:
        axes.annotate(
            member.trial,
            (cost_of_record(member, front.cost), member.val_top1),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
            color=FRONT,
        )
    axes.set(xlabel=AXIS[front.cost], ylabel="validation top-1 (%)")
    axes.set_title(f"hypervolume {front.hypervolume:.4f}", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def kept_png(front: Front, records: Sequence[TrialRecord], path: Path) -> None:
    """Draw what each member kept of each block: heads, neurons, tokens and weights."""
    members = list(front.members) or [front.dense]
    blocks = len(front.dense.shape["blocks"])
    height = max(1.6, 0.42 * len(members) + 1.0)
    figure = Figure(
        figsize=(2.2 + 4 * max(2.6, 0.42 * blocks), height), dpi=110, layout="constrained"
    )
    grid = figure.subplots(1, len(PANELS), sharey=True)
    for axes, panel in zip(grid, PANELS, strict=True):
        kept = np.stack([kept_shares(m.shape, front.dense.shape)[panel] for m in members])
        image = axes.imshow(kept, cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
        for (row, column), share in np.ndenumerate(kept):
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 0.6 else "black",
            )
        axes.set_title(f"{panel} kept (%)", fontsize=9)
        axes.set_xticks(range(blocks), range(blocks), fontsize=7)
        axes.set_xlabel("block", fontsize=8)
    labels = [f"{m.trial}  {cost_ratio(front, m):.2f}x  {m.val_top1:.1f} %" for m in members]
    grid[0].set_yticks(range(len(members)), labels, fontsize=8)
    figure.colorbar(image, ax=grid, fraction=0.012, pad=0.01)
    _save(figure, path)


def kept_shares(shape: dict, dense: dict) -> dict[str, NDArray[np.float64]]:
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


def _density(shape: dict, block: dict, index: int) -> float:
    inner, dim = block["heads"] * block["v_dim"], shape["dim"]
    sizes = {
        f"blocks.{index}.attn.qkv": dim * (2 * block["heads"] * block["qk_dim"] + inner),
        f"blocks.{index}.attn.proj": dim * inner,
        f"blocks.{index}.mlp.fc1": dim * block["hidden"],
        f"blocks.{index}.mlp.fc2": dim * block["hidden"],
    }
    nonzero = sum(shape["nonzero"].get(site, size) for site, size in sizes.items() if size)
    return _ratio(nonzero, sum(sizes.values()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _dominated(front: Front, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    members = {member.trial for member in front.members}
    return [r for r in records if r.status == "finished" and r.trial not in members]


def _xy(front: Front, records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    return [cost_of_record(r, front.cost) for r in records], [r.val_top1 or 0.0 for r in records]


def _scatter(
    front: Front,
    records: list[TrialRecord],
    name: str,
    color: str,
    mode: str,
    size: int,
    symbol: str = "circle",
) -> go.Scatter:
    x, y = _xy(front, records)
    texts = ["<br>".join([r.name, *_hover(front, r)]) for r in records]
    marker = {"size": size, "color": color, "symbol": symbol}
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode=mode,
        marker=marker,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(front: Front, record: TrialRecord) -> list[str]:
    test = f", test {record.test_top1:.1f} %" if record.test_top1 is not None else ""
    return [
        f"validation {record.val_top1:.1f} %{test}",
        f"{record.gmacs:.4g} GMACs, {record.effective_gmacs:.4g} effective "
        f"({cost_ratio(front, record):.2f}x dense)",
        f"{record.params:,} params, density {record.density:.2f}",
        f"{record.images_per_s:,.0f} images/s",
        *textwrap.wrap(record.plan_line, 60),
    ]


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
