"""What a reviewer sees of a sweep in MLflow: the parent run's note, its tables and its pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.tracking import MlflowClient

from search.change import change
from search.drawing import write_png
from search.front_plot import front_html
from search.gallery import gallery
from search.note import note
from search.results import Front, TrialRecord, front_json

REDRAW_S, REST = 60.0, 19.0
"""Seconds for which the pictures stay as they are, and multiples of the time that drawing them
took: the page alone has 5 MB, and more with each trial.
"""


class ParentPage:
    """Keeps a parent run worth reading while its sweep runs."""

    def __init__(
        self,
        client: MlflowClient,
        parent: str,
        directory: Path,
        about: str,
        earlier: Front | None,
    ) -> None:
        """Write nothing yet.

        Args:
            client: MLflow.
            parent: Run of the sweep.
            directory: The sweep's directory, where pictures are drawn.
            about: What is searched, as Markdown.
            earlier: The front that the sweep starts from, if it does.
        """
        self.client, self.parent, self.directory = client, parent, directory
        self.about, self.earlier = about, earlier
        self.redraw = -math.inf

    def show(self, front: Front, records: Sequence[TrialRecord], links: Mapping[str, str]) -> None:
        """Show the sweep as far as it is: note and tables at once, pictures now and then."""
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
        self.client.log_text(self.parent, front_html(front, records), "front.html")
        for name, figure in gallery(front, records).items():
            path = self.directory / f"{name}.png"
            write_png(figure, path)
            self.client.log_artifact(self.parent, str(path))
        end = time.monotonic()
        self.redraw = end + max(REDRAW_S, REST * (end - start))
