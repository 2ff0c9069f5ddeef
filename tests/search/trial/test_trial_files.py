from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch

from pruners import PrunableViT
from search.records.digests import json_digest
from search.records.events import EpochResult
from search.records.trial_record import model_path
from search.sweep.spec import SweepFailedError
from search.trial.trial_files import DECISIVE, TrialFiles, check_model
from tests.search.trial_events import config_of, result_of

CONFIG = config_of("0007")


def tuner(steps: int = 0, **state: object) -> dict:
    return {"steps": steps, **state}


def result(epoch: int, status: str = "running") -> EpochResult:
    return result_of("0007", epoch=epoch, status=status, val_top1=50.0 + epoch)


@pytest.fixture
def vit(tiny) -> PrunableViT:
    return tiny()


@pytest.fixture
def files(tmp_path: Path) -> TrialFiles:
    return TrialFiles(tmp_path, CONFIG)


def saved_twice(files: TrialFiles, vit: PrunableViT) -> Path:
    """Save two epochs; return the folder of the last."""
    files.save(vit, [result(0)], tuner(step=torch.tensor(1)), 1.0)
    files.save(vit, [result(0), result(1)], tuner(step=torch.tensor(2)), 2.5)
    return files.directory / "epoch-0001"


def test_what_was_saved_is_read_back(files: TrialFiles, vit: PrunableViT, tmp_path: Path) -> None:
    assert files.load() is None
    folder = saved_twice(files, vit)
    saved = TrialFiles(tmp_path, CONFIG).load()
    assert saved.results == [result(0), result(1)]
    assert saved.tuner == tuner(step=torch.tensor(2))
    assert saved.seconds == 2.5
    assert saved.directory == folder == tmp_path / model_path("0007", 1)
    again = PrunableViT.load(saved.directory)
    for ours, theirs in zip(again.parameters(), vit.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert os.listdir(files.directory) == ["epoch-0001"]  # neither older ones nor temporary ones


def test_the_last_epoch_keeps_only_the_model(files: TrialFiles, vit: PrunableViT) -> None:
    saved_twice(files, vit)
    files.save(vit, [result(0), result(1), result(2, "finished")], None, 3.0)
    saved = files.load()
    assert saved.tuner is None
    assert saved.results[-1] == result(2, "finished")
    assert not (saved.directory / "tuner.pt").exists()


def test_a_save_that_was_cut_short_does_not_count(files: TrialFiles, vit: PrunableViT) -> None:
    folder = saved_twice(files, vit)
    torn = files.directory / ".epoch-0002.node.1"  # its process died
    torn.mkdir()
    (torn / "results.json").write_text("{")
    assert files.load().directory == folder
    files.save(vit, [result(0), result(1), result(2)], tuner(), 1.0)
    assert os.listdir(files.directory) == ["epoch-0002"]


def test_the_newest_counts_where_an_older_one_was_not_removed(
    files: TrialFiles, vit: PrunableViT, tmp_path: Path
) -> None:
    files.save(vit, [result(9)], tuner(), 1.0)
    (files.directory / "epoch-0009").rename(tmp_path / "epoch-0009")
    files.save(vit, [result(10)], tuner(), 1.0)
    (tmp_path / "epoch-0009").rename(files.directory / "epoch-0009")
    assert files.load().results == [result(10)]


@pytest.mark.parametrize("key", [*DECISIVE, "parameters"])
def test_another_trial_of_the_name_is_not_continued(
    key: str, files: TrialFiles, vit: PrunableViT, tmp_path: Path
) -> None:
    saved_twice(files, vit)
    other = TrialFiles(tmp_path, dataclasses.replace(CONFIG, **{key: "other"}))
    assert (other.load() is None) == (key in DECISIVE)
    other.save(vit, [result(1)], tuner(), 1.0)
    assert other.load().results == [result(1)]


@pytest.mark.parametrize("name", ["model.safetensors", "shape.json", "tuner.pt", "results.json"])
@pytest.mark.parametrize("damage", ["torn", "changed", "missing"])
def test_damaged_files_are_named(
    name: str, damage: str, files: TrialFiles, vit: PrunableViT
) -> None:
    folder = saved_twice(files, vit)
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "torn":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).write_bytes(content[:-3] + bytes(b ^ 255 for b in content[-3:]))
    with pytest.raises(ValueError, match=rf"epoch-0001/{name} is damaged or missing"):
        files.load()


@pytest.mark.parametrize(
    "change",
    [
        {"results": []},
        {"results": [{"epoch": 1, "status": "running", "val_top1": 51.0}]},
        {"results": [result_of("0007").to_report() | {"x": 1}]},
        {"results": 3},
        {"digests": {}},
        {"digests": {"../x": ""}},
        {"identity": 1},
        {"seconds": "x"},
    ],
)
def test_results_of_another_form_are_never_used(
    change: dict, files: TrialFiles, vit: PrunableViT
) -> None:
    path = saved_twice(files, vit) / "results.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        files.load()  # the digest is of what was written
    del values["digest"]
    path.write_text(json.dumps(values | {"digest": json_digest(values)}))
    if "identity" in change:
        assert files.load() is None
        return
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        files.load()


def test_nothing_is_unpickled(files: TrialFiles, vit: PrunableViT) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(files.directory / "evil"),)

    files.save(vit, [result(0)], tuner(step=Evil()), 1.0)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        files.load()
    assert not (files.directory / "evil").exists()


def test_what_was_saved_in_the_middle_of_an_epoch_is_newer_than_its_start(
    files: TrialFiles, vit: PrunableViT
) -> None:
    start = saved_twice(files, vit)
    for steps in (9, 123_456):
        files.save(vit, [result(0), result(1)], tuner(steps), 4.0)
        saved = files.load()
        assert (saved.tuner["steps"], saved.seconds) == (steps, 4.0)
        assert os.listdir(files.directory) == [f"epoch-0001-{steps:06d}"]
    (files.directory / "epoch-0001-123456").rename(files.directory.parent / "middle")
    files.save(vit, [result(0), result(1)], tuner(), 2.5)
    (files.directory.parent / "middle").rename(files.directory / "epoch-0001-123456")
    assert files.load().tuner["steps"] == 123_456
    assert start.exists()
    files.save(vit, [result(0), result(1), result(2)], tuner(), 5.0)
    assert os.listdir(files.directory) == ["epoch-0002"]


@pytest.mark.parametrize("name", ["model.safetensors", "shape.json", "results.json"])
def test_a_model_that_changed_since_is_named(
    name: str, files: TrialFiles, vit: PrunableViT
) -> None:
    files.save(vit, [result(0), result(1, "finished")], None, 1.0)
    folder = files.directory / "epoch-0001"
    check_model(folder)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1  # still a whole file
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing"):
        check_model(folder)


def test_a_full_disk_stops_the_sweep_by_name(
    files: TrialFiles, vit: PrunableViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_twice(files, vit)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.replace", full)
        with pytest.raises(SweepFailedError, match="cannot be written to: No space left on device"):
            files.save(vit, [result(0), result(1), result(2)], tuner(), 3.0)
    assert files.load().directory == folder
