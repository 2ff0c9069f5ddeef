from __future__ import annotations

import pytest

from search.records.front import build_front
from search.sweep.toml import load_sweep
from search.tracking.note import LONGEST, about_sweep, note
from tests.search.trial_records import DENSE, record


def rows_below(text: str, header: str) -> list[str]:
    """Return the rows of the table whose header begins so."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return lines[start:end]


def test_members_link_to_their_runs() -> None:
    records = [DENSE, record("0001", 0.5, 70.0, test_top1=69.0), record("0002", 0.7, 75.0)]
    links = {"0001": "#/experiments/7/runs/abc"}
    text = note(build_front(records, "effective_gmacs"), records, "sweep a", links)
    assert text.startswith("**Front** of validation top-1 against effective MACs: 0.50x 70.0 %")
    assert text.endswith("\n\nsweep a")
    first, second, dense = (row.replace("\u2002", "") for row in rows_below(text, "| trial |"))
    assert first.startswith("| [0001](#/experiments/7/runs/abc) | 70.0 | 69.0 | 2 |")
    assert second.startswith("| 0002 | 75.0 |  | 2 | 0.70x |")
    assert dense.startswith("| dense ")
    assert (
        "- 0001 grouped 0.50x: grouped: neurons -50 %\n- 0002 grouped 0.70x: grouped: neurons -50 %"
        in text
    )


def test_trials_that_did_not_finish_are_counted_by_their_reason() -> None:
    records = [
        DENSE,
        record("0001", 0.5, 70.0),
        *(record(f"{i:04d}", 0.5, 60.0, "stopped") for i in (2, 3)),
        record("0004", 0.5, 60.0, "stopped", reason="40 images/s is below min_images_per_s = 50"),
        record("0005", 0.5, None, "failed", reason="a | b\nc"),
        record("0006", 0.5, None, "running"),
    ]
    text = note(build_front(records, "effective_gmacs"), records, "", {"0002": "#2"})
    assert "**Trials**: 1 finished, 3 stopped, 1 failed, 1 running." in text
    assert rows_below(text, "| end |") == [
        "| failed | 1 | a \\| b c | 0005 |",
        "| stopped early | 2 | others of similar cost were better | [0002](#2) |",
        "| stopped early | 1 | 40 images/s is below min_images_per_s = 50 | 0004 |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("members", "words"), [(3, 60), (30, 40), (200, 40)])
def test_mlflow_keeps_the_whole_note(members: int, words: int) -> None:
    """It would cut a longer one off, in the middle of a table."""
    plan = "grouped: heads -10 % (0 to 20), " * words
    records = [
        DENSE,
        *(record(f"{i:04d}", i / 300, 20 + i / 10, plan_line=plan) for i in range(1, members + 1)),
        *(record(f"{i:04d}", 0.9, None, "failed", reason=f"why {i}") for i in range(400, 450)),
    ]
    links = {r.trial: f"#/experiments/123456/runs/{'f' * 32}" for r in records}
    text = note(build_front(records, "effective_gmacs"), records, "about " * 30, links)
    assert len(text) <= LONGEST
    shown = rows_below(text, "| trial |")
    assert shown[-1].startswith("| [dense]")
    assert text.count("\n- 0") == len(shown) - 1
    assert len(rows_below(text, "| end |")) == 8
    left = members + 1 - len(shown)
    assert (f"{left} more members are in front.json" in text) == (left > 0)
    assert (left > 0) == (members == 200)


def test_it_says_what_is_searched_of_which_model(sweep_file) -> None:
    text = about_sweep(load_sweep(sweep_file), 5_000_000)
    assert "sweep tiny: 6 trials of 1 epochs over grouped, evit, magnitude; 0.5 to 0.9 of" in text
    assert "vit.safetensors`" in text
    assert "val.parquet`" in text
