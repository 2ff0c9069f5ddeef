from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pruners.families.learned import Learned
from search.__main__ import main
from search.records.files import DONE, write_front, write_trials
from search.records.front import build_front
from search.records.journal import Journal
from search.records.ledger import LEDGER
from search.report.report import masks_by_class, write_report
from tests.search.logged import SHAPE
from tests.search.trial_records import DENSE, record

RECORDS = [
    dataclasses.replace(DENSE, shape=SHAPE, by_class=[80.0, 90.0, None]),
    record("0001", 0.5, 70.0, shape=SHAPE, by_class=[75.0, 65.0, None], spent=2, test_top1=69.5),
    record("0002", 0.6, 60.0, shape=SHAPE, plan_line="evit: tokens -11 %", spent=4),
    record("0003", 0.2, None, "failed", reason="</td><script>alert(1)</script>", spent=5),
    record("0004", 0.3, 20.0, "stopped", spent=5),
    record("0005", 0.3, None, "running"),
]


@pytest.fixture
def directory(minimal: Path) -> Path:
    """A sweep that runs."""
    folder = minimal.parent / "results"
    folder.mkdir()
    minimal.rename(folder / "sweep.toml")
    front = build_front(RECORDS, "effective_gmacs", ("<b>cat", "dog", "elk"))
    write_trials(folder / "trials.parquet", RECORDS)
    write_front(folder / "front.json", front)
    return folder


def learn(directory: Path, label: str, path: Path, *, learns: bool = True) -> None:
    run = {"label": label, "budget": 0.5, "path": str(path), "learns": learns}
    Journal(directory / LEDGER).append({"event": "learned", "runs": [run]})


def masks(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"blocks.0.mlp.neuron": torch.rand(3, 16, generator=generator)}


class Words(HTMLParser):
    """What of a page is read, and its open elements."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += data.split()


def test_a_sweep_is_one_page(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(directory, out)
    page = out.read_text()
    parser = Words()
    parser.feed(page)
    assert parser.open == []
    words = " ".join(parser.words)
    for said in (
        "Sweep a This sweep has not ended",
        "2 finished, 1 stopped, 1 failed, 1 running; 5 epochs of fine-tuning. Hypervolume 0.3500",
        "0.3 to 0.8 of the dense model's effective MACs",
        "0001 70.0 69.5 2 1 0.5 2.00x 1,000 0.50 12 grouped: neurons -50 %",
        "0.3500 after 5 epochs",
        "units: neurons",
        "change of top-1, class by class",
        "<b>cat 80 %",
        "failed 1 </td><script>alert(1)</script>",
        "stopped early 1 others of similar cost were better",
        'method = "magnitude", scope = "layer"',
    ):
        assert said in words, said
    assert "<script>alert" not in page
    assert "<script src" not in page
    assert "Which units serve" not in page
    assert "evit: tokens -11 %" in page  # in what is hovered
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


@pytest.mark.slow
def test_the_verb_writes_the_page(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(directory), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "Sweep a" in out.read_text()


def test_a_sweep_that_has_only_measured_the_dense_model(directory: Path, tmp_path: Path) -> None:
    write_trials(directory / "trials.parquet", RECORDS[:1])
    write_front(directory / "front.json", build_front(RECORDS[:1], "effective_gmacs"))
    write_report(directory, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert 'Hypervolume <span class="front">0.0000</span>' in text
    assert "Which classes pay" not in text


def test_an_ended_sweep_is_not_said_to_run(directory: Path, tmp_path: Path) -> None:
    (directory / DONE).touch()
    write_report(directory, tmp_path / "report.html")
    assert "has not ended" not in (tmp_path / "report.html").read_text()


def test_the_pictures_are_written_too(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    Learned(scores={}, by_class=masks(0), report={"seconds": 1.0}).save(path)
    learn(directory, "x_pruner", path)
    write_report(directory, tmp_path / "report.html", tmp_path / "pictures")
    names = {"front", "hypervolume", "kept", "methods", "classes", "units_by_class-x_pruner"}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == names
    for picture in (tmp_path / "pictures").iterdir():
        assert np.asarray(Image.open(picture).convert("L")).std() > 3
    text = (tmp_path / "report.html").read_text()
    assert "Which units serve which classes (x_pruner)" in text


def test_masks_are_those_of_steps_that_learned_some(directory: Path, tmp_path: Path) -> None:
    for name, by_class in (("a", masks(0)), ("b", masks(1)), ("c", {})):
        path = tmp_path / f"{name}.safetensors"
        Learned(scores={}, by_class=by_class, report={"seconds": 1.0}).save(path)
    learn(directory, "x_pruner", tmp_path / "a.safetensors")
    learn(directory, "x_pruner", tmp_path / "b.safetensors")  # for another budget
    learn(directory, "uvc", tmp_path / "c.safetensors")
    learn(directory, "magnitude", tmp_path / "a.safetensors", learns=False)
    learn(directory, "x_pruner-2", tmp_path / "gone.safetensors")
    found = masks_by_class(directory)
    assert list(found) == ["x_pruner"]
    np.testing.assert_allclose(
        found["x_pruner"]["blocks.0.mlp.neuron"], masks(0)["blocks.0.mlp.neuron"]
    )


@pytest.mark.parametrize("name", ["sweep.toml", "front.json", "trials.parquet"])
def test_what_is_missing_is_named(name: str, directory: Path, tmp_path: Path) -> None:
    (directory / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        write_report(directory, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
