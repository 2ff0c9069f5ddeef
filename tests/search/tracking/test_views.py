from __future__ import annotations

import base64
import json
import zlib

from search.records.events import METRICS
from search.tracking.params import trial_params
from search.tracking.views import COLUMNS, FRONT, TRIALS, view_address, view_tags
from tests.search.trial_records import record


def test_views_show_what_is_logged() -> None:
    """The browser tests look at the page itself."""
    tags = view_tags(1_700_000_000_000)
    assert set(tags) == {f"mlflow.sharedViewState.{name}" for name in (FRONT, TRIALS)}
    states = {}
    for value in tags.values():
        view = json.loads(value)
        packed = view["state"].removeprefix("deflate;")
        states[view["name"]] = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert states["front"]["searchFilter"] == 'tags.front = "true"'
    assert states["front"]["selectedColumns"] == list(COLUMNS)
    known = {f"metrics.`{key}`" for key in (*METRICS, "test_top1")}
    known |= {f"params.`{key}`" for key in trial_params(record("0001", 0.5, 70.0))}
    known |= {"tags.`status`", "tags.`reason`"}
    assert known >= {*COLUMNS, states["trials"]["orderByKey"]}


def test_a_view_has_an_address() -> None:
    address = view_address("7", FRONT)
    assert address.startswith("#/experiments/7/runs?viewStateShareKey=front")
