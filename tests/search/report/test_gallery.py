from __future__ import annotations

import dataclasses

from search.records.front import build_front
from search.report.gallery import gallery
from tests.search.logged import SHAPE
from tests.search.trial_records import DENSE, record


def test_classes_are_drawn_where_they_are_known() -> None:
    records = [
        dataclasses.replace(DENSE, shape=SHAPE, by_class=[80.0, 90.0]),
        record("0001", 0.5, 70.0, shape=SHAPE),
    ]
    front = build_front(records, "effective_gmacs")
    assert list(gallery(front, records)) == ["front", "hypervolume", "kept", "methods"]
    records[1] = dataclasses.replace(records[1], by_class=[75.0, 65.0])
    front = build_front(records, "effective_gmacs")
    assert list(gallery(front, records))[-1] == "classes"
