"""What happens to a sweep's directory: full, read-only, damaged, changed."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import Faulty, actors, until
from tests.images import labelled, write_images

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

MOUNTED_MB = 64


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MOUNTED_MB}m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def on(disk: Path, faulty: Faulty) -> Faulty:
    """The same sweeps, with results on another disk."""
    sweep = disk.parent / "tiny.toml"
    text = faulty.sweep.read_text().replace(f"{faulty.sweep.parent}/results", f"{disk}/results")
    sweep.write_text(text)
    (disk.parent / "results").symlink_to(disk / "results")
    shutil.copytree(faulty.directory("whole"), disk / "results" / "whole")
    return dataclasses.replace(faulty, sweep=sweep)


def fill(path: Path) -> None:
    """Write until there is no space left."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"0" * 4096)
            except OSError:
                return


def remount(disk: Path, how: str) -> bool:
    """Make a disk read-only ("ro") or writable ("rw"); False while somebody writes to it."""
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_stops_the_sweep_and_loses_nothing(small_disk: Path, faulty: Faulty) -> None:
    one = on(small_disk, faulty)
    driver = one.start("full")
    until(lambda: one.lines("full") >= 6, 150)
    filler = small_disk / "filler"
    fill(filler)
    said = one.finish(driver, 1)
    assert "cannot be written to: No space left on device; nothing that was finished" in said
    assert "Traceback" not in said
    ended = one.events("full", "ended")
    filler.unlink()
    one.run("full")
    assert one.events("full", "ended")[: len(ended)] == ended
    one.same("full", "whole")


def test_a_disk_that_becomes_read_only_stops_the_sweep(small_disk: Path, faulty: Faulty) -> None:
    one = on(small_disk, faulty)
    # Not on that disk: a file that stays open for writing would keep it writable.
    uri = f"sqlite:///{small_disk.parent}/mlflow.db"
    environment = {**one.environment, "MLFLOW_TRACKING_URI": uri}
    one = dataclasses.replace(one, environment=environment)
    sets = [f'tracking="{uri}"']
    driver = one.start("frozen", *sets)
    until(lambda: one.lines("frozen") >= 6, 150)
    until(lambda: remount(small_disk, "ro"))
    said = one.finish(driver, 1)
    assert "cannot be written to: Read-only file system" in said
    assert "Traceback" not in said
    said = one.finish(one.start("frozen", *sets), 1)  # from its start
    assert "cannot be written to: Read-only file system" in said
    assert "Traceback" not in said
    assert remount(small_disk, "rw")
    one.run("frozen", *sets)
    one.same("frozen", "whole")


@pytest.fixture
def own(tmp_path: Path, faulty: Faulty) -> Faulty:
    """The same sweeps, on a copy of model and data that may be changed."""
    for name in ("train.parquet", "val.parquet", "test.parquet", "vit.safetensors"):
        shutil.copy(faulty.sweep.parent / name, tmp_path / name)
    sweep = tmp_path / "tiny.toml"
    sweep.write_text(faulty.sweep.read_text().replace(str(faulty.sweep.parent), str(tmp_path)))
    shutil.copytree(faulty.directory("whole"), tmp_path / "results" / "whole")
    return dataclasses.replace(faulty, sweep=sweep)


def interrupted(one: Faulty, name: str) -> Path:
    """Kill a sweep in the middle of a trial, and return what that has left."""
    driver = one.start(name)
    until(lambda: one.lines(name) >= 6, 150)
    left = until(lambda: list(one.directory(name).glob("models/*/epoch-*/tuner.pt")))[0].parent
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    for actor in actors():
        actor.kill()
    return until(lambda: list(left.parent.glob("epoch-*")))[-1]


def test_a_torn_checkpoint_is_named_and_not_used(own: Faulty) -> None:
    left = interrupted(own, "torn")
    weights = left / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = own.run("torn")
    assert f"began anew: {weights} is damaged or missing" in said
    own.same("torn", "whole")


def test_models_of_trials_that_had_ended_are_named_when_they_are_damaged(own: Faulty) -> None:
    driver = own.start("bit")
    until(lambda: len(own.events("bit", "ended")) >= 3, 150)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    models = list(own.directory("bit").glob("models/*/epoch-*/model.safetensors"))
    for model in models:
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
    said = own.finish(own.start("bit"), 1)
    assert "model.safetensors is damaged or missing" in said


def test_what_changed_under_a_sweep_is_named_and_not_used(own: Faulty) -> None:
    interrupted(own, "changed")
    folder = own.sweep.parent
    for path, message in (
        (folder / "val.parquet", "data.val has changed since sweep changed began"),
        (folder / "vit.safetensors", "model has changed since sweep changed began"),
        (folder / "train.parquet", "train.parquet is not a Parquet file"),
        (own.directory("changed") / "ledger.jsonl", "ledger.jsonl is damaged at"),
    ):
        content = path.read_bytes()
        if path.stem == "val":
            write_images(path, *labelled(40, seed=9))
        elif path.stem == "train":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:-500] + bytes([content[-500] ^ 1]) + content[-499:])
        said = own.finish(own.start("changed"), 2)
        assert message in said
        assert "Traceback" not in said
        path.write_bytes(content)
    own.run("changed")
    own.same("changed", "whole")
