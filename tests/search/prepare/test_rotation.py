"""A sweep over a model in the basis of its stream's principal directions."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from pruners import PrunableViT
from search.check import check
from search.data.splits import open_split
from search.prepare.rotation import rotation_digest, turn_once
from search.records.files import read_trials
from search.run import run
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep

ROTATE = "model.rotate=true"
WIDTH = 'steps=[{method="surgeon", units=["neuron", "width"]}]'


def test_a_turned_model_is_found_again_and_anything_decisive_changes_its_name(
    sweep_file: Path, tmp_path: Path
) -> None:
    sweep = load_sweep(sweep_file, [ROTATE])
    dense, _ = check(sweep)
    first = turn_once(sweep, dense, tmp_path / "a")
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert turn_once(sweep, dense, tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    turned, images = PrunableViT.load(first), torch.randn(5, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(turned(images), dense(images), rtol=1e-4, atol=1e-5)
    assert turned.arch is not None
    assert turned.arch["args"]["norm_layer"] == "rmsnorm"
    assert (turned.mean, turned.std) == (dense.mean, dense.std)

    train, val = (open_split(sweep, dense, split) for split in ("train", "val"))
    names = {rotation_digest(sweep, dense, images) for images in (train, val)}
    for changed in ("seed=1", "data.batch_size=8", "data.calibration=16"):
        names.add(rotation_digest(load_sweep(sweep_file, [ROTATE, changed]), dense, train))
    with torch.no_grad():
        dense.vit.head.bias[0] += 1e-6
    names.add(rotation_digest(sweep, dense, train))
    assert len(names) == 6


def test_a_model_that_cannot_be_turned_is_refused_at_the_door(sweep_file: Path) -> None:
    name = (
        'model={name="vit_tiny_patch16_224", pretrained=false, args={num_classes=5, qk_norm=true}}'
    )
    sweep = load_sweep(sweep_file, [name, ROTATE])
    with pytest.raises(SweepError, match=r"model\.rotate: q and k are normalised.*rotate = f"):
        check(sweep)


@pytest.mark.usefixtures("ray_session")
def test_the_trials_of_a_sweep_cut_the_turned_model(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, [ROTATE, WIDTH, "trials=3", "ladder=2"])
    stream = io.StringIO()
    assert run(sweep, stream) == 0, stream.getvalue()
    (turned,) = (Path(sweep.storage) / "learned").glob("rotated-*")
    dense, *cut = read_trials(sweep.directory / "trials.parquet")
    assert dense.params == sum(p.numel() for p in PrunableViT.load(turned).parameters())
    assert all(trial.params < dense.params for trial in cut)
    assert run(sweep, io.StringIO()) == 0  # finished: shown, not turned again
