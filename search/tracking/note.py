"""The note of a sweep's parent run in MLflow: a page in Markdown, which a reviewer reads first."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from search.records.front import Front, cost_ratio
from search.records.outcomes import counts, reasons
from search.records.trial_record import TrialRecord
from search.report.progress import UNIT, front_line, headline, top1_text
from search.sweep.spec import Sweep
from search.tracking.views import FRONT, TRIALS

LONGEST = 8000
"""Characters that MLflow keeps of a note; it cuts off the rest."""

PLAN_WIDTHS = (400, 160, 80, 30)
"""Characters of a plan: as many as leave room for all members of the front."""

_SEPARATOR = "\u2002 | "
"""Between cells: MLflow draws columns without any space between them."""

REASONS = 8
"""Most reasons of stopped and failed trials that are shown, the commonest first."""


def about_sweep(sweep: Sweep, dense_cost: int) -> str:
    """Describe a sweep: its search, its model and its images."""
    model = sweep.model.path or sweep.model.name
    return (
        f"{headline(sweep, dense_cost)}.\n\nModel `{model}`, trained on `{sweep.data.train}`, "
        f"compared on `{sweep.data.val}`; only the final front is measured on `{sweep.data.test}`."
    )


def note(front: Front, records: Sequence[TrialRecord], about: str, links: Mapping[str, str]) -> str:
    """Return the note, at most `LONGEST` characters.

    Args:
        front: The front so far.
        records: All trials.
        about: The sweep's search, model and images, as Markdown.
        links: Trial, or view of `mlflow_views` -> address of its run.
    """
    rows = (*front.members, front.dense)
    for width in PLAN_WIDTHS:
        text = _page(front, rows, records, about, links, width)
        if len(text) <= LONGEST:
            return text
    while len(text) > LONGEST and len(rows) > 1:  # the dearest members are left out
        rows = (*rows[:-2], front.dense)
        text = _page(front, rows, records, about, links, PLAN_WIDTHS[-1])
    return text[:LONGEST]


def _page(
    front: Front,
    rows: Sequence[TrialRecord],
    records: Sequence[TrialRecord],
    about: str,
    links: Mapping[str, str],
    width: int,
) -> str:
    # The front first: MLflow folds a note behind its first lines.
    missing = len(front.members) + 1 - len(rows)
    parts = [
        f"**Front** of validation top-1 against {UNIT[front.cost]}: {front_line(front)}",
        _front_table(front, rows, links),
        _plans(rows, width),
        f"{missing} more members are in front.json." if missing else "",
        "Artifacts: `front.html` (hover over a point to read its plan), `hypervolume.png`, "
        "`kept.png`, `methods.png`, `classes.png`, `front.json`, `sweep.toml`. "
        f"Runs as tables: {_linked('the front', FRONT, links)}, "
        f"{_linked('all trials', TRIALS, links)}; filter them by "
        '`tags.front = "true" and metrics.gmacs < 0.04`.',
        _ends_table(records, links),
        about,
    ]
    return "\n\n".join(part for part in parts if part)


def _front_table(front: Front, rows: Sequence[TrialRecord], links: Mapping[str, str]) -> str:
    lines = [
        "| trial | val % | test % | epochs | cost | GMACs | effective | params | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in rows:
        test = f"{record.test_top1:.1f}" if record.test_top1 is not None else ""
        name = "dense" if record.origin == "dense" else record.trial
        cells = [
            _linked(name, record.trial, links),
            top1_text(record),
            test,
            str(record.epochs),
            f"{cost_ratio(front, record):.2f}x",
            f"{record.gmacs:.4g}",
            f"{record.effective_gmacs:.4g}",
            f"{record.params:,}",
            f"{record.images_per_s:,.0f}",
        ]
        lines.append(f"| {_SEPARATOR.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _plans(rows: Sequence[TrialRecord], width: int) -> str:
    return "\n".join(
        f"- {record.name}: {textwrap.shorten(record.plan_line, width, placeholder=' …')}"
        for record in rows
        if record.origin != "dense"
    )


def _ends_table(records: Sequence[TrialRecord], links: Mapping[str, str]) -> str:
    """Return the number of trials by end, and the reasons of those that did not finish."""
    lines = [f"**Trials**: {counts(records)}."]
    found = reasons(records)
    if found:
        lines += ["", "| end | trials | why | for example |", "|---|---|---|---|"]
    for reason in found[:REASONS]:
        example = _linked(reason.trials[0], reason.trials[0], links)
        why = textwrap.shorten(reason.why, 200, placeholder=" …")
        cells = [reason.end, str(len(reason.trials)), why, example]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _linked(text: str, trial: str, links: Mapping[str, str]) -> str:
    return f"[{text}]({links[trial]})" if trial in links else text


def _cell(text: str) -> str:
    """Escape the characters that would end a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")
