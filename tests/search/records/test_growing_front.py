from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.records.front import build_front
from search.records.growing_front import GrowingFront, growth
from search.records.trial_record import TrialRecord
from tests.search.trial_records import DENSE, record

# Few values, so that points are often equal, or equal in one objective.
COSTS, TOPS = st.sampled_from([0.3, 0.4, 0.5, 0.6]), st.sampled_from([50.0, 60.0, 70.0, math.nan])


@st.composite
def histories(draw: st.DrawFn) -> list[TrialRecord]:
    """Records in the order in which they end, the dense model's among them."""
    count = draw(st.integers(1, 12))
    records = [
        record(
            f"{number:04d}",
            draw(COSTS),
            draw(TOPS),
            draw(st.sampled_from(["finished"] * 4 + ["stopped", "failed"])),
            violates=draw(st.sampled_from(["", "", "", "params 9 beyond max_params = 8"])),
        )
        for number in draw(st.permutations(range(1, count + 1)))
    ]
    records.insert(draw(st.integers(0, min(2, count))), DENSE)
    again = [r for r in records if r.status == "finished"]
    for number in range(draw(st.integers(0, 6)) if again else 0):
        first = draw(st.sampled_from(again))
        origin = draw(st.sampled_from(["confirm", "confirm", "final"]))
        records.append(
            record(
                f"{100 + number:04d}",
                first.cost_ratio,
                draw(TOPS),
                draw(st.sampled_from(["finished", "finished", "failed"])),
                origin=origin,
                of=first.trial,
                epochs=2 if origin == "confirm" else 5,
            )
        )
    return records


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(records=histories())
def test_it_is_the_front_of_all_records_after_each(records: list[TrialRecord]) -> None:
    growing, by_name = GrowingFront("effective_gmacs"), {r.trial: r for r in records}
    for number, new in enumerate(records, 1):
        growing.add(new, *([by_name[new.of]] if new.of else []))
        seen = sorted(records[:number], key=lambda r: r.trial)
        if DENSE in seen:
            assert growing.front == build_front(seen, "effective_gmacs")
        else:
            assert growing.front is None


@settings(max_examples=100, deadline=None)
@given(records=histories())
def test_it_goes_on_from_records_that_come_at_once(records: list[TrialRecord]) -> None:
    for cut in range(len(records)):
        growing = GrowingFront("effective_gmacs")
        growing.add(*records[:cut])
        by_name = {r.trial: r for r in records}
        for new in records[cut:]:
            growing.add(new, *([by_name[new.of]] if new.of else []))
        ordered = sorted(records, key=lambda r: r.trial)
        assert growing.front == build_front(ordered, "effective_gmacs")


def test_only_members_are_compared() -> None:
    """Or the hundredth trial would cost more than the first."""
    growing = GrowingFront("effective_gmacs")
    growing.add(DENSE, record("0001", 0.3, 60.0))
    for number in range(2, 100):
        growing.add(record(f"{number:04d}", 0.3 + number / 1000, 50.0))
    assert set(growing._points) == {"0001"}


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
