from __future__ import annotations

from pathlib import Path

import pytest

from pruners import PrunableViT
from search.records.trial_record import model_path
from search.sweep.toml import load_sweep
from search.tracking.served import make_served
from search.trial.trial_files import TrialFiles
from tests.images import features, write_classes
from tests.models import build_tiny, cut
from tests.search.made import Made
from tests.search.trial_events import config_of, result_of
from tests.search.trial_records import record
from tests.sweeps import MINIMAL, write_sweep


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path


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
