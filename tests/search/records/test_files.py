from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest

from search.records.files import read_front, read_trials, write_front, write_trials
from search.records.front import Front, build_front
from search.records.trial_record import TrialRecord


def record(
    trial: str, cost: float, top1: float | None, status: str = "finished", **more
) -> TrialRecord:
    values = {
        "trial": trial,
        "name": f"{trial} grouped {cost:.2f}x",
        "status": status,
        "origin": "search",
        "methods": "grouped",
        "epochs": 2,
        "cost_ratio": cost,
        "val_top1": top1,
        "gmacs": 2 * cost,
        "effective_gmacs": cost,
        "params": 1000,
        "density": 0.5,
        "images_per_s": 12.5,
        "plan": {
            "steps": [
                {"method": "grouped", "options": {}, "thresholds": {"blocks.0.mlp.neuron": 0.5}}
            ]
        },
        "plan_line": "grouped: neurons -50 %",
        "shape": {"dim": 8, "blocks": [], "nonzero": {}},
        "seconds": 3.5,
        "history": [{"epoch": 0, "val_top1": 50.0}, {"epoch": 1, "val_top1": 60.0}],
        "checkpoint": f"models/{trial}/epoch-0001",
    }
    return TrialRecord(**{**values, **more})


DENSE = record("0000", 1.0, 80.0, "dense", origin="dense", methods="dense")


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


def test_only_finished_finite_trials_enter_the_front() -> None:
    records = [
        record("0001", 0.5, 70.0),
        record("0002", 0.4, 99.0, "failed"),
        record("0003", 0.3, 99.0, "stopped"),
        record("0004", 0.2, 99.0, "running"),
        record("0005", 0.2, math.nan),
        record("0006", 0.2, None),
        record("0007", 0.6, 60.0),
        DENSE,
    ]
    front = build_front(records, "effective_gmacs")
    assert [m.trial for m in front.members] == ["0001"]
    assert front.dense == DENSE
    assert front.hypervolume == pytest.approx(0.5 * 0.7)


def test_the_chosen_cost_decides() -> None:
    a, b = record("0001", 0.5, 70.0), record("0002", 0.4, 65.0, gmacs=1.5)
    assert len(build_front([DENSE, a, b], "effective_gmacs").members) == 2
    assert [m.trial for m in build_front([DENSE, a, b], "gmacs").members] == ["0001"]


def test_a_front_needs_the_dense_model() -> None:
    with pytest.raises(ValueError, match="measure the dense model first"):
        build_front([record("0001", 0.5, 70.0)], "gmacs")


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


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DENSE.val_top1 = 90.0  # type: ignore[misc]
