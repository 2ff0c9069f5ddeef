"""Table and picture of `search_quality.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from anytime import (
    Curve,
    Ended,
    Goal,
    best_below,
    curve,
    epochs_to_reach,
    front,
    goal,
    mean,
    standard_error,
    within,
)
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

Arms = dict[str, list[list[Ended]]]
"""Arm -> the trials of each seed."""

REFERENCES = (0.0, 50.0)
"""Percent: the reference accuracies of the hypervolume, that of a sweep and a stricter one."""

COSTS = (0.3, 0.5, 0.7)
ENGINE = "engine"


def table(arms: Arms, epochs: int, rivals: list[str]) -> str:
    """Return the whole report as Markdown."""
    third = epochs // 3
    whole, strict = ({a: curves(t, epochs, r) for a, t in arms.items()} for r in REFERENCES)
    level = best_level(whole, rivals)
    head = [
        "arm",
        "seeds",
        "epochs",
        f"hypervolume at {third}",
        f"at {epochs}",
        f"above 50 % at {third}",
        f"at {epochs}",
        "reaches the best rival's end",
        *(f"best ≤ {cost:g}x" for cost in COSTS),
        "before against after",
        "trained / only looked at",
        "s before training",
        "s training",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, runs in arms.items():
        used = [within(run, epochs) for run in runs]
        reached = None if level is None else epochs_to_reach(mean(whole[arm]), level)
        cells = [
            arm,
            f"{len(runs)}",
            " ".join(f"{sum(t.epochs for t in run):g}" for run in used),
            *(
                cell(values[:, e], 4)
                for values in (whole[arm], strict[arm])
                for e in (third, epochs)
            ),
            "-" if reached is None else f"{reached} ({reached / epochs:.0%})",
            *(cell(np.array([best_below(run, cost) for run in used]), 1) for cost in COSTS),
            cell(np.array([rank_correlation(run) for run in used]), 2),
            f"{count(used, trained)} / {count(used, lambda t: not trained(t))}",
            f"{seconds(used, lambda t: t.before_s):.0f}",
            f"{seconds(used, lambda t: t.train_s):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", goal_line(whole, rivals), "", *NOTES])


NOTES = [
    "Hypervolume: validation top-1 / 100 against MACs as a share of the dense model's, up to the "
    "reference point (1, 0); above 50 %: up to (1, 0.5). Mean ± standard error over seeds, when so "
    "many training epochs are spent (a stopped trial counts the epochs it ran, an elastic start "
    "four for each of its own). Best: validation top-1 in percent. Validation only: each arm's "
    "best is also the luckiest of what it tried. Before against after: rank correlation of top-1 "
    "before tuning and after it, over the trials that were tuned to their end.",
    "Seconds, per seed, by the clock: before training are scoring, cutting and measuring the "
    "untuned model, which cost no epochs.",
]


def curves(runs: list[list[Ended]], epochs: int, reference: float) -> Curve:
    """Return the hypervolume of each seed for each number of epochs spent, [seeds, epochs + 1]."""
    return np.stack([curve(run, epochs, reference) for run in runs])


def best_level(whole: dict[str, Curve], rivals: list[str]) -> float | None:
    """Return the highest mean hypervolume that a rival ends at; None without rivals."""
    return max((float(mean(whole[r])[-1]) for r in rivals if r in whole), default=None)


def goal_line(whole: dict[str, Curve], rivals: list[str]) -> str:
    """Say what the goal is and whether it is met."""
    statement = (
        "Goal: the hypervolume of the best rival at the end is reached by the engine with at most "
        "one third of its epochs, and the engine ends above it by more than the spread between "
        "seeds (both standard deviations, squared, summed, rooted)."
    )
    present = {name: whole[name] for name in rivals if name in whole}
    if ENGINE not in whole or not present:
        return f"{statement} Not known: it needs the engine and at least one rival."
    return f"{statement} {verdict(goal(whole[ENGINE], present))}"


def verdict(found: Goal) -> str:
    """Say whether a goal is met, part by part."""
    reached = "never reaches"
    if found.reached is not None:
        when = "early enough" if found.early else "too late"
        reached = f"reaches after {found.reached} of {found.epochs} epochs, {when}"
    spread = "unknown of one seed" if math.isnan(found.spread) else f"{found.spread:.4f}"
    met = "met" if found.early and found.above else "not met"
    return (
        f"**{met.capitalize()}**: the best rival, {found.rival}, ends at {found.level:.4f}, which "
        f"the engine {reached}; the engine ends {found.margin:+.4f} from it, "
        f"{'more' if found.above else 'not more'} than the spread, which is {spread}."
    )


def cell(values: Curve, digits: int) -> str:
    """Mean and standard error over seeds."""
    if np.isnan(values).any():
        return "-"
    error = float(standard_error(values))
    text = f"{float(mean(values)):.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def rank_correlation(run: list[Ended]) -> float:
    """Return Spearman's rank correlation of top-1 before tuning and after it; NaN below three."""
    pairs = [(t.untuned, t.top1) for t in run if t.untuned is not None and t.top1 is not None]
    return float(spearmanr(pairs).statistic) if len(pairs) > 2 else math.nan


def trained(trial: Ended) -> bool:
    return trial.epochs > 0


def count(runs: list[list[Ended]], holds: Callable[[Ended], bool]) -> str:
    """Trials of each seed for which something holds."""
    return " ".join(str(sum(map(holds, run))) for run in runs)


def seconds(runs: list[list[Ended]], of: Callable[[Ended], float]) -> float:
    """Seconds of all trials of a seed, the mean over seeds."""
    return sum(of(trial) for run in runs for trial in run) / len(runs)


def draw(arms: Arms, epochs: int, path: Path) -> None:
    """Draw hypervolume over epochs, for both reference points, and the fronts at the end."""
    figure = Figure(figsize=(15.0, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    whole, strict, fronts = figure.subplots(1, 3)
    colors = {arm: colormaps["tab20"](place % 20) for place, arm in enumerate(arms)}
    colors[ENGINE] = (0.0, 0.0, 0.0, 1.0)
    for axes, reference in zip((whole, strict), REFERENCES, strict=True):
        values = {arm: curves(runs, epochs, reference) for arm, runs in arms.items()}
        for arm in arms:
            _draw_curve(axes, arm, values[arm], colors[arm])
        # The first plans would take most of the height.
        axes.set_ylim(bottom=min(float(mean(v)[epochs // 6 + 1]) for v in values.values()))
        axes.set_xlabel("training epochs spent")
        axes.set_ylabel(f"hypervolume, reference point (1, {reference / 100:g})")
    for arm, runs in arms.items():
        for run in runs:
            members = front(within(run, epochs))
            fronts.plot(
                [member.cost for member in members],
                [member.top1 or math.nan for member in members],
                color=colors[arm],
                marker=".",
                linewidth=_width(arm),
                alpha=0.8,
                drawstyle="steps-post",
            )
    fronts.set_xlabel("MACs, of the dense model's")
    fronts.set_ylabel("validation top-1, %")
    for axes in (whole, strict, fronts):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_curve(axes: Axes, arm: str, values: Curve, color: tuple[float, ...]) -> None:
    spent, middle, error = range(values.shape[1]), mean(values), standard_error(values)
    axes.plot(spent, middle, color=color, linewidth=_width(arm), label=arm, drawstyle="steps-post")
    axes.fill_between(
        spent, middle - error, middle + error, color=color, alpha=0.15, linewidth=0, step="post"
    )


def _width(arm: str) -> float:
    return 2.4 if arm == ENGINE else 1.2
