from __future__ import annotations

import json
import math
import os

import pytest

from search.records.files import read_front, read_trials, write_front, write_trials
from search.records.front import Front, build_front
from tests.search.trial_records import DENSE, record


def test_trials_round_trip(tmp_path) -> None:
    records = [
        DENSE,
        record("0003", 0.5, 70.0, test_top1=69.5),
        record("0001", 0.4, None, "failed", reason="x\ny"),
    ]
    write_trials(tmp_path / "trials.parquet", records)
    assert read_trials(tmp_path / "trials.parquet") == records
    assert os.listdir(tmp_path) == ["trials.parquet"]


def test_front_round_trip(tmp_path) -> None:
    front = build_front(
        [DENSE, record("0001", 0.7, 75.0), record("0002", 0.4, 60.0, by_class=[1.0, None])],
        "effective_gmacs",
        ("cat", "dog"),
    )
    write_front(tmp_path / "front.json", front)
    again = read_front(tmp_path / "front.json")
    assert isinstance(again, Front)
    assert [m.trial for m in again.members] == ["0002", "0001"]
    assert again.hypervolume == front.hypervolume
    assert again.classes == ("cat", "dog")
    assert again.members[0].by_class == [1.0, None]
    values = json.loads((tmp_path / "front.json").read_text())
    assert set(values) == {"cost", "hypervolume", "reference", "classes", "dense", "front"}
    wanted = {
        "trial",
        "val_top1",
        "test_top1",
        "gmacs",
        "effective_gmacs",
        "params",
        "density",
        "images_per_s",
        "plan",
    }
    assert all(wanted <= set(member) for member in (*values["front"], values["dense"]))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"cost": "gmacs"}', '{"cost": 1, "hypervolume": 1, "dense": {}, "front": []}'],
)
def test_a_broken_front_is_named(text: str, tmp_path) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(ValueError, match=r"front\.json is no front"):
        read_front(tmp_path / "front.json")


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="give the directory of a sweep"):
        read_front(tmp_path / "front.json")
    with pytest.raises(FileNotFoundError, match="give the directory of a sweep"):
        read_trials(tmp_path / "trials.parquet")
    (tmp_path / "trials.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="is no table of trials"):
        read_trials(tmp_path / "trials.parquet")


OUTSIDE = ("../../etc", "/etc", "models/0001/../../x", "models/0001/epoch-0001/..", "models/x")


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_model_lies_below_the_sweeps_directory(place: str, tmp_path) -> None:
    member = record("0001", 0.5, 70.0, checkpoint=place)
    write_trials(tmp_path / "trials.parquet", [member])
    with pytest.raises(ValueError, match=r"trials\.parquet is no table.*checkpoint"):
        read_trials(tmp_path / "trials.parquet")
    write_front(tmp_path / "front.json", build_front([DENSE, member], "gmacs"))
    with pytest.raises(ValueError, match=r"front\.json is no front.*checkpoint"):
        read_front(tmp_path / "front.json")


@pytest.mark.parametrize("name", ["../x", "x", "1", "", "0001/..", "0001\n"])
def test_trials_are_numbers(name: str, tmp_path) -> None:
    write_trials(tmp_path / "trials.parquet", [record(name, 0.5, 70.0, checkpoint="")])
    with pytest.raises(ValueError, match=r"trials\.parquet is no table.*'trial'"):
        read_trials(tmp_path / "trials.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"val_top1": None},
        {"effective_gmacs": 0.0},
        {"effective_gmacs": math.nan},
        {"params": "many"},
        {"density": []},
        {"epochs": 1.5},
    ],
)
def test_what_a_front_shows_is_checked(change: dict, tmp_path) -> None:
    path = tmp_path / "front.json"
    write_front(path, build_front([DENSE, record("0001", 0.5, 70.0)], "effective_gmacs"))
    values = json.loads(path.read_text())
    values["front"][0] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"front\.json is no front"):
        read_front(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"front\.json is no front"):
        read_front(path)
