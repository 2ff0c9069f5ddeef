from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from search.old_checkpoints import SNAPSHOTS, OldCheckpoints


def write(old: OldCheckpoints, folder: Path, trial: str, number: int) -> None:
    path = folder / trial / f"checkpoint_{number:06d}"
    path.mkdir(parents=True, exist_ok=True)
    checkpoint: Any = SimpleNamespace(path=str(path))
    old.on_checkpoint(0, [], SimpleNamespace(), checkpoint)  # type: ignore[arg-type]


def left(folder: Path, trial: str = "0001") -> list[int]:
    return sorted(int(p.name.removeprefix("checkpoint_")) for p in (folder / trial).iterdir())


def test_what_a_snapshot_on_disk_names_is_kept(tmp_path: Path) -> None:
    old = OldCheckpoints(tmp_path)
    for number in range(8):
        write(old, tmp_path, "0001", number)
        if number % 2:
            old.get_state()  # names 1, 3, 5 and 7
    assert left(tmp_path) == [3, 4, 5, 6, 7]  # 3 and 5 were named before 7


def test_without_snapshots_nothing_goes(tmp_path: Path) -> None:
    old = OldCheckpoints(tmp_path)
    for number in range(5):
        write(old, tmp_path, "0001", number)
    assert left(tmp_path) == [0, 1, 2, 3, 4]


def test_at_the_end_each_trial_keeps_its_newest(tmp_path: Path) -> None:
    old = OldCheckpoints(tmp_path)
    for trial, count in (("0001", 3), ("0002", 1)):
        for number in range(count):
            write(old, tmp_path, trial, number)
    old.end()
    assert (left(tmp_path), left(tmp_path, "0002")) == ([2], [0])


def test_a_continued_sweep_goes_on_from_what_is_there(tmp_path: Path) -> None:
    before = OldCheckpoints(tmp_path)
    for number in range(4):
        write(before, tmp_path, "0001", number)
    old = OldCheckpoints(tmp_path)
    old.get_state()
    assert left(tmp_path) == [0, 1, 2, 3]  # the snapshot that it continued from may name any
    write(old, tmp_path, "0001", 2)  # it did name 1
    write(old, tmp_path, "0001", 3)
    write(old, tmp_path, "0001", 4)
    old.end()
    assert left(tmp_path) == [4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["0001", "0002", "snapshot"]), max_size=40))
def test_the_last_snapshots_can_always_be_continued(
    tmp_path_factory: Any, events: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("trials")
    old, newest, snapshots = OldCheckpoints(folder), dict[str, int](), list[dict[str, int]]()
    for event in events:
        if event == "snapshot":
            old.get_state()
            snapshots.append(dict(newest))
        else:
            newest[event] = newest.get(event, -1) + 1
            write(old, folder, event, newest[event])
        for snapshot in [*snapshots[-SNAPSHOTS:], newest]:
            for trial, number in snapshot.items():
                assert number in left(folder, trial)
        for trial in newest:
            first = snapshots[-SNAPSHOTS - 1].get(trial, 0) if len(snapshots) > SNAPSHOTS else 0
            assert left(folder, trial)[0] == first
