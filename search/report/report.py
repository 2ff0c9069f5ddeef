"""`python -m search report`: a sweep as one page, for people without MLflow."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pruners.families.learned import Learned
from pruners.model.files import replace_file
from search.records.files import DONE, read_front, read_trials
from search.records.journal import Journal
from search.records.ledger import LEDGER
from search.records.outcomes import counts, reasons
from search.report.drawing import write_png
from search.report.front_plot import front_figure
from search.report.gallery import gallery
from search.report.page import interactive, page, still
from search.report.progress import COLUMNS, UNIT, cells
from search.report.units_by_class import draw_units
from search.sweep.toml import load_sweep

_PAGE = """{% extends "frame" %}
{% block body %}
<main>
<h1>Sweep {{ sweep.name }}</h1>
{% if not ended %}
<p class="front">This sweep has not ended: what follows is what it has so far.</p>
{% endif %}
<p>Model {{ sweep.model.path or sweep.model.name }}, pruned by {{ sweep.labels | join(", ") }};
compared on {{ sweep.data.val }}, the front also measured on {{ sweep.data.test }}. Trials cost
{{ "%.4g" | format(sweep.shares.low) }} to {{ "%.4g" | format(sweep.shares.high) }} of the
dense model's {{ "MACs" if front.cost == "latency" else unit }}; accuracy is traded against
{{ unit }}.</p>
<p>{{ counts }}; {{ spent }} epochs of fine-tuning.
Hypervolume <span class="front">{{ "%.4f" | format(front.hypervolume) }}</span>.</p>

<h2>Front</h2>
{{ plot }}
<div class="printed">{{ pictures.front }}</div>
<div class="scroll"><table>
<thead><tr>
{% for column in columns %}
<th{% if not loop.first %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
<th>plan</th></tr></thead>
<tbody>
{% for cells, plan in rows %}
<tr>
{% for cell in cells %}
<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
<td>{{ plan }}</td></tr>
{% endfor %}
</tbody></table></div>
<p>"fewer": how many times fewer {{ unit }} than the dense model.
{% if confirmed %}
"val %": mean of further seeds ± spread of all; "~": the next cheaper model may be as good.
{% endif %}
</p>

<section>
<h2>Hypervolume against epochs spent</h2>
{{ pictures.hypervolume }}
</section>

<section>
<h2>What each member kept of each block</h2>
{{ pictures.kept }}
</section>

<section>
<h2>How the methods compare</h2>
<p>What each combination of methods reached by itself.</p>
{{ pictures.methods }}
</section>

{% if "classes" in pictures %}
<section>
<h2>Which classes pay</h2>
<p>Top-1 on validation images, class by class, against the dense model.</p>
{{ pictures.classes }}
</section>
{% endif %}

{% for label, picture in units.items() %}
<section>
<h2>Which units serve which classes ({{ label }})</h2>
<p>In each block the units stand in the order of the class that they serve most.</p>
{{ picture }}
</section>
{% endfor %}

<h2>Trials that were stopped or failed</h2>
{% if reasons %}
<table>
<thead><tr><th>end</th><th class="number">trials</th><th>why</th></tr></thead>
<tbody>
{% for reason in reasons %}
<tr><td>{{ reason.end }}</td><td class="number">{{ reason.trials | length }}</td>
<td>{{ reason.why }}</td></tr>
{% endfor %}
</tbody></table>
{% else %}
<p>None.</p>
{% endif %}
{% if failed %}
<h3>Each that failed</h3>
<table>
<thead><tr><th>trial</th><th>why</th><th>plan</th></tr></thead>
<tbody>
{% for record in failed %}
<tr><td>{{ record.name }}</td><td>{{ record.reason }}</td><td>{{ record.plan_line }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}

<h2>The sweep as run</h2>
<pre>{{ toml }}</pre>
</main>
{% endblock %}
"""


def write_report(directory: Path, out: Path, pictures: Path | None = None) -> None:
    """Write a sweep as one self-contained page, whether the sweep has ended or not.

    Args:
        directory: The sweep's directory.
        out: File to write, under a temporary name first.
        pictures: Folder that the still pictures are also written to as PNG files; None for none.

    Raises:
        FileNotFoundError: If there are no results.
        ValueError: If they are damaged.
    """
    front = read_front(directory / "front.json")
    records = read_trials(directory / "trials.parquet")
    sweep = load_sweep(directory / "sweep.toml")
    figures = gallery(front, records)
    units = {
        label: draw_units(masks, front.classes)
        for label, masks in masks_by_class(directory).items()
    }
    aliases = sweep.alias_budgets if sweep.register_front else ()
    text = page(
        _PAGE,
        title=f"sweep {sweep.name}",
        sweep=sweep,
        front=front,
        ended=(directory / DONE).exists(),
        unit=UNIT[front.cost],
        counts=counts(records),
        spent=max(record.spent for record in records),
        columns=COLUMNS,
        rows=[(cells(front, r), r.plan_line) for r in (*front.members, front.dense)],
        confirmed=any(member.spread is not None for member in front.members),
        plot=interactive(
            front_figure(front, records, (sweep.shares.low, sweep.shares.high), aliases), "560px"
        ),
        pictures={name: still(figure) for name, figure in figures.items()},
        units={label: still(figure) for label, figure in units.items()},
        reasons=reasons(records),
        failed=[record for record in records if record.status == "failed"],
        toml=(directory / "sweep.toml").read_text(),
    )
    replace_file(out, partial(Path.write_text, data=text, encoding="utf-8"))
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        named = {f"units_by_class-{label}": figure for label, figure in units.items()}
        for name, figure in (figures | named).items():
            write_png(figure, pictures / f"{name}.png")


def masks_by_class(directory: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return step -> site -> mask of each unit for each class, [classes, units].

    Steps whose method learns no such masks are left out. Of a step that learned for several
    budgets the first counts: masks do not depend on the budget.

    Raises:
        ValueError: If a file is damaged.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for event in Journal(directory / LEDGER).read():
        for run in event.get("runs", []):
            if run["learns"] and run["label"] not in found and Path(run["path"]).is_file():
                masks = Learned.load(Path(run["path"])).by_class
                if masks:
                    found[run["label"]] = {site: m.double().numpy() for site, m in masks.items()}
    return found
