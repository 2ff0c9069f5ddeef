from __future__ import annotations

import io
from pathlib import Path

import pytest

from search.__main__ import main
from search.records.files import write_front
from search.records.front import build_front
from search.records.trial_record import TrialRecord
from search.report.compare import (
    COLUMNS,
    fronts_figure,
    print_comparison,
    read_fronts,
    rows,
    write_comparison,
)
from tests.search.trial_records import DENSE, record


def written(
    folder: Path, *members: TrialRecord, dense: TrialRecord = DENSE, cost: str = "effective_gmacs"
) -> Path:
    folder.mkdir()
    front = build_front([dense, *members], cost)
    write_front(folder / "front.json", front)
    return folder


@pytest.fixture
def sweeps(tmp_path: Path) -> list[Path]:
    return [
        written(tmp_path / "a", record("0001", 0.4, 60.0), record("0002", 0.6, 70.0)),
        written(tmp_path / "b", record("0003", 0.4, 65.0), record("0004", 0.6, 69.0)),
        written(tmp_path / "[c] <i>"),
    ]


def test_points_won_and_lost_in_closed_form(sweeps: list[Path]) -> None:
    first, second, third = rows(read_fronts(sweeps))
    before, after = 0.2 * 0.6 + 0.4 * 0.7, 0.2 * 0.65 + 0.4 * 0.69
    assert first == (str(sweeps[0]), f"{before:.4f}", "", "2", "", "")
    growth = f"{100 * (after / before - 1):+.1f} %"
    assert second == (str(sweeps[1]), f"{after:.4f}", growth, "2", "1: 0003", "1: 0002")
    assert third == (str(sweeps[2]), "0.0000", "-100.0 %", "0", "0", "2: 0001, 0002")


def test_the_table_is_printed(sweeps: list[Path]) -> None:
    stream = io.StringIO()
    fronts = dict(zip(["a", "b", "[c]"], read_fronts(sweeps).values(), strict=True))
    print_comparison(fronts, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == " ".join(COLUMNS).split()
    assert lines[2].split() == ["b", "0.4060", "+1.5", "%", "2", "1:", "0003", "1:", "0002"]
    assert lines[3].startswith("[c] ")


def test_the_page_holds_all_fronts(sweeps: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    write_comparison(read_fronts(sweeps), out)
    text = out.read_text()
    assert "[c] &lt;i&gt;" in text
    assert "[c] <i>" not in text
    assert "<script src" not in text
    assert "1: 0003" in text
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [out]


def test_the_verb_prints_and_writes(
    sweeps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directories = [str(path) for path in sweeps]
    assert main(["compare", *directories]) == 0
    assert "points won" in capsys.readouterr().out
    assert main(["compare", *directories, "--out", str(tmp_path / "a.html")]) == 0
    assert "points won" in (tmp_path / "a.html").read_text()
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'a.html'}\n")


def test_costs_are_shares_of_each_dense_model(tmp_path: Path) -> None:
    """Two measurements of the same model's speed differ."""
    fast = record("0000", 1.0, 80.0, "dense", origin="dense", latency_ms=4.0)
    slow = record("0000", 1.0, 80.0, "dense", origin="dense", latency_ms=5.0)
    member = record("0001", 0.5, 70.0, latency_ms=2.0)
    folders = [
        written(tmp_path / "a", member, dense=fast, cost="latency"),
        written(tmp_path / "b", member, dense=slow, cost="latency"),
    ]
    figure = fronts_figure(read_fronts(folders))
    assert [list(trace.x) for trace in figure.data] == [[0.5], [0.4], [1.0]]
    assert figure.layout.xaxis.title.text == "time per image, share of the dense model's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": 999}, "params of the dense model is 1000 in .*a and 999 in .*b"),
        ({"gmacs": 2.1}, "gmacs of the dense model is 2 in .*a and 2.1 in .*b"),
        ({"val_top1": 79.0}, "val_top1 of the dense model is 80 in .*a and 79 in .*b"),
    ],
)
def test_another_dense_model_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    values = {"origin": "dense", "methods": "dense", **change}
    other = record("0000", 1.0, values.pop("val_top1", 80.0), "dense", **values)
    folders = [written(tmp_path / "a"), written(tmp_path / "b", dense=other)]
    with pytest.raises(ValueError, match=message):
        read_fronts(folders)


def test_another_cost_is_refused(tmp_path: Path) -> None:
    folders = [written(tmp_path / "a"), written(tmp_path / "b", cost="gmacs")]
    with pytest.raises(ValueError, match=r"cost is effective_gmacs in .*a and gmacs in .*b"):
        read_fronts(folders)


def test_one_sweep_is_not_compared(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    with pytest.raises(ValueError, match="1 sweep to compare; give two"):
        read_fronts([folder, folder])
