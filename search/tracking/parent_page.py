"""The page of a sweep's parent run in MLflow: its note, its tables and its pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

from search.records.files import front_json
from search.records.front import Front
from search.records.front_diff import change
from search.records.trial_record import TrialRecord
from search.report.drawing import write_png
from search.report.front_plot import front_html
from search.report.gallery import gallery
from search.report.report import masks_by_class
from search.report.units_by_class import draw_units
from search.sweep.spec import Sweep
from search.tracking.note import note

REDRAW_S, REST = 60.0, 19.0
"""Seconds for which the pictures stay as they are, and multiples of the time that drawing them
took: the page alone has 5 MB, and more with each trial.
"""


class ParentPage:
    """Keeps the note and the pictures of a parent run up to date while its sweep runs."""

    def __init__(
        self,
        client: MlflowClient,
        parent: str,
        sweep: Sweep,
        about: str,
        earlier: Front | None,
    ) -> None:
        """Write nothing yet.

        Args:
            client: MLflow.
            parent: Run of the sweep.
            sweep: The sweep, in whose directory pictures are drawn.
            about: The sweep's search, model and images, as Markdown.
            earlier: The front that the sweep starts from, if it does.
        """
        self.client, self.parent, self.sweep = client, parent, sweep
        self.about, self.earlier = about, earlier
        self.redraw = -math.inf

    def show(self, front: Front, records: Sequence[TrialRecord], links: Mapping[str, str]) -> None:
        """Update the page: note and tables at once, pictures now and then."""
        self.describe(front, records, links)
        if time.monotonic() >= self.redraw:
            self.draw(front, records)

    def describe(
        self, front: Front, records: Sequence[TrialRecord], links: Mapping[str, str]
    ) -> None:
        """Write the note and `front.json`."""
        self.client.log_dict(self.parent, front_json(front), "front.json")
        about = self.about
        if self.earlier is not None:
            against = change(self.earlier, front).describe()
            about += f"\n\nAgainst the front it started from: {against}"
        text = note(front, records, about, links)
        self.client.set_tag(self.parent, "mlflow.note.content", text)

    def draw(self, front: Front, records: Sequence[TrialRecord]) -> None:
        """Draw the pictures."""
        start = time.monotonic()
        budget = self.sweep.shares
        aliases = self.sweep.alias_budgets if self.sweep.register_front else ()
        html = front_html(front, records, (budget.low, budget.high), aliases)
        self.client.log_text(self.parent, html, "front.html")
        for name, figure in gallery(front, records).items():
            self._log(name, figure)
        end = time.monotonic()
        self.redraw = end + max(REDRAW_S, REST * (end - start))

    def draw_learned(self) -> None:
        """Draw which units serve which classes, where a method has learned that."""
        for label, masks in masks_by_class(self.sweep.directory).items():
            self._log(f"units_by_class-{label}", draw_units(masks))

    def _log(self, name: str, figure: Figure) -> None:
        path = self.sweep.directory / f"{name}.png"
        write_png(figure, path)
        self.client.log_artifact(self.parent, str(path))
