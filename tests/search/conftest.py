from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pruners import PrunableViT
from search.records.trial_record import TrialRecord, model_path
from search.sweep.spec import Sweep
from search.sweep.toml import load_sweep
from search.tracking.served import Served, make_served
from search.trial.trial_files import TrialFiles
from tests.conftest import build_tiny, write_sweep
from tests.pruners.export.test_onnx import cut
from tests.search.data.test_shards import features, write_classes
from tests.search.records.test_files import record
from tests.search.trial_events import config_of, result_of

MINIMAL = """
name = "a"
budget = [0.3, 0.8]
trials = 4
epochs = 1
model.name = "vit_tiny_patch16_224"
data = { train = "t", val = "v", test = "s" }
steps = [{ method = "magnitude", scope = "layer" }]
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path


@dataclass(frozen=True, kw_only=True)
class Made:
    """The MLflow model of one trial, made for real, and what it was made of."""

    sweep: Sweep
    member: TrialRecord
    vit: PrunableViT
    served: Served


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its model is pruned in every way; the validation images have names for their classes."""
    folder = tmp_path_factory.mktemp("made")
    sweep = load_sweep(write_sweep(folder))
    write_classes(folder / "val.parquet", features(["a", "b", "c", "d", "e"]))
    vit = cut(build_tiny(patch_size=4))
    vit.mean, vit.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    results = [result_of("0007", epoch=1, status="finished", val_top1=61.5)]
    TrialFiles(sweep.directory, config_of("0007")).save(vit, results, None, 1.0)
    member = record("0007", 0.5, 61.5, checkpoint=model_path("0007", 1))
    served = make_served(sweep, member, 0.45, {"model": "aa", "data.val": "bb"}, 59.25)
    vit = PrunableViT.load(sweep.directory / member.checkpoint).eval()
    return Made(sweep=sweep, member=member, vit=vit, served=served)
