from __future__ import annotations

import random

import pytest

from search.records.front import build_front
from search.records.growing_front import growth
from tests.search.records.test_files import DENSE, record


def test_closed_form() -> None:
    """Rectangles; trials come in another order than that in which they ended."""
    records = [
        record("0003", 0.8, 80.0, spent=2),
        record("0001", 0.5, 70.0, spent=4),
        DENSE,
        record("0002", 0.6, 60.0, spent=6),  # dominated
        record("0004", 0.3, None, "failed", spent=6),
        record("0005", 0.1, 10.0, "running"),
    ]
    assert growth(records, "effective_gmacs") == [
        (0, 0.0),
        (2, pytest.approx(0.2 * 0.8)),
        (4, pytest.approx(0.2 * 0.8 + 0.3 * 0.7)),
        (6, pytest.approx(0.2 * 0.8 + 0.3 * 0.7)),
    ]


def test_it_is_the_front_of_all_that_ended_by_then() -> None:
    rng = random.Random(0)
    records = [DENSE]
    for number in range(1, 40):
        again = number > 30
        first = rng.choice(records[1:20]) if again else None
        records.append(
            record(
                f"{number:04d}",
                first.cost_ratio if first else rng.uniform(0.2, 0.9),
                rng.uniform(20.0, 80.0),
                rng.choice(["finished", "finished", "stopped"]) if not again else "finished",
                spent=2 * number // 3,
                origin="confirm" if first else "search",
                of=first.trial if first else "",
            )
        )
    shuffled = rng.sample(records, len(records))
    found = growth(shuffled, "effective_gmacs")
    assert [spent for spent, _ in found] == sorted({r.spent for r in records})
    for spent, volume in found:
        by_then = build_front([r for r in records if r.spent <= spent], "effective_gmacs")
        assert volume == pytest.approx(by_then.hypervolume)


def test_nothing_before_the_dense_model() -> None:
    early = record("0001", 0.5, 70.0, spent=2)
    assert growth([early], "effective_gmacs") == []
    late = record("0000", 1.0, 80.0, "dense", origin="dense", spent=3)
    assert growth([early, late], "effective_gmacs") == [(3, pytest.approx(0.35))]
