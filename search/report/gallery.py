"""The still pictures of a sweep, by name, for MLflow, reports and folders of files."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from search.records.front import Front
from search.records.trial_record import TrialRecord
from search.report.class_changes import class_changes, draw_classes
from search.report.kept import draw_kept
from search.report.pictures import draw_front, draw_growth, draw_methods


def gallery(front: Front, records: Sequence[TrialRecord]) -> dict[str, Figure]:
    """Draw a sweep.

    Args:
        front: Its front.
        records: All its trials.

    Returns:
        "front", "hypervolume", "kept", "methods", and "classes" where the accuracy of classes is
        known.
    """
    figures = {
        "front": draw_front(front, records),
        "hypervolume": draw_growth(front, records),
        "kept": draw_kept(front),
        "methods": draw_methods(front, records),
    }
    changes = class_changes(front)
    if changes is not None:
        figures["classes"] = draw_classes(front, changes)
    return figures
