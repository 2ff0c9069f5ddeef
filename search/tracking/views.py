"""Views of a sweep's runs that MLflow's page offers: columns and order worth looking at.

The page shows no metric in its table until a user selects it. It saves a selection as a tag of the
experiment; such tags are written here (format of MLflow 3.17's page).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping

TAG = "mlflow.sharedViewState."

FRONT, TRIALS = "front", "trials"
"""Keys and names of the views: the front's members, and all trials."""

COLUMNS = (
    "metrics.`val_top1`",
    "metrics.`test_top1`",
    "metrics.`cost_ratio`",
    "metrics.`gmacs`",
    "metrics.`images_per_s`",
    "tags.`status`",
    "tags.`reason`",
    "params.`methods`",
    "params.`plan`",
)

_STATE = {
    "orderByKey": "metrics.`cost_ratio`",
    "orderByAsc": True,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": list(COLUMNS),
    "columnOrder": [],
    "columnWidths": {},
    "runsHiddenMode": "FIRST_10_RUNS",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": False,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "groupBy": None,
    "groupsExpanded": {},
    "globalLineChartConfig": {
        "xAxisKey": "step",
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
    },
}


def view_tags(time_ms: int) -> dict[str, str]:
    """Return the views as tags of an experiment.

    Args:
        time_ms: When they were made, in milliseconds since 1970.
    """
    filters = {FRONT: 'tags.front = "true"', TRIALS: 'tags.trial != ""'}
    return {
        f"{TAG}{name}": json.dumps(
            {
                "name": name,
                "createdAt": time_ms,
                "updatedAt": time_ms,
                "state": _packed({**_STATE, "searchFilter": search}),
            }
        )
        for name, search in filters.items()
    }


def view_address(experiment: str, name: str) -> str:
    """Return the address of a view, relative to MLflow's page."""
    page = f"#/experiments/{experiment}/runs"
    return f"{page}?viewStateShareKey={name}&workflowType=machine_learning"


def _packed(state: Mapping[str, object]) -> str:
    packed = zlib.compress(json.dumps(state).encode())
    return f"deflate;{base64.b64encode(packed).decode()}"
