from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import ray

from search.records.front import build_front
from search.sweep.spec import SweepFailedError
from search.tracking.serving import served_models, start_serving
from tests.search.made import Made
from tests.search.trial_records import DENSE

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_models_of_a_front_are_made_and_what_cannot_be_is_said(
    made: Made, tmp_path: Path
) -> None:
    shutil.copytree(made.sweep.directory, tmp_path / made.sweep.name)
    sweep = made.sweep.model_copy(update={"storage": str(tmp_path)})
    less = {"effective_gmacs": 0.2, "val_top1": 50.0, "checkpoint": "models/0008/epoch-0001"}
    lost = dataclasses.replace(made.member, trial="0008", **less)
    front = build_front([DENSE, lost, made.member], "effective_gmacs")
    assert len(front.members) == 2
    tests = {member.trial: ray.put(59.25) for member in front.members}
    served, failed = served_models(start_serving(sweep, front, tests, {"model": "aa"}))
    assert {trial: one.digest for trial, one in served.items()} == {"0007": made.served.digest}
    assert served["0007"].directory == tmp_path / "tiny" / "served" / "0007"
    assert list(failed) == ["0008"]
    assert failed["0008"].endswith("results.json is damaged or missing")


def test_a_directory_that_cannot_be_written_to_stops_the_sweep(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.sweep.directory, tmp_path / made.sweep.name)
    sweep = made.sweep.model_copy(update={"storage": str(tmp_path)})
    folder = sweep.directory / "served"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    front = build_front([DENSE, made.member], "effective_gmacs")
    with pytest.raises(SweepFailedError, match="served cannot be written to: "):
        served_models(start_serving(sweep, front, {"0007": ray.put(59.25)}, {"model": "aa"}))
