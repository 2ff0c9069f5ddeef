from __future__ import annotations

import io
import json
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from pruners import Plan, PrunableViT, Step, load_method
from pruners.export.onnx import onnx_call
from search import export
from search.export import check_replaceable, example_images, export_trial
from search.records.files import write_trials
from search.records.trial_record import TrialRecord
from search.sweep.toml import load_sweep, sweep_toml
from search.trial.trial_files import TrialFiles
from tests.models import images_for
from tests.search.trial_events import config_of, result_of

ALL = {
    *("model.safetensors", "shape.json", "model.pt2", "model.onnx", "measured.json"),
    *("timm.safetensors", "load_timm.py", "semi_structured.json"),
}


def add(directory: Path, trial: str, vit: PrunableViT, status: str) -> TrialRecord:
    """Leave what a trial leaves."""
    last = result_of(trial, epoch=1, status="finished", val_top1=61.25)
    TrialFiles(directory, config_of(trial)).save(vit, [last], None, 1.0)
    return TrialRecord(
        trial=trial,
        name=trial,
        status=status,
        origin="ladder",
        methods="grouped",
        cost_ratio=0.5,
        val_top1=61.25,
        test_top1=60.0 if status == "finished" else None,
        plan={"steps": []},
        plan_line="grouped: neurons -50 %",
        checkpoint=f"models/{trial}/epoch-0001",
    )


@pytest.fixture
def sweep(sweep_file: Path, tiny) -> Path:
    """The directory of a sweep: dense, units with 2:4 weights, merged tokens, failed."""
    directory = sweep_file.parent / "results" / "tiny"
    directory.mkdir(parents=True)
    (directory / "sweep.toml").write_text(sweep_toml(load_sweep(sweep_file)))
    args = {"patch_size": 4, "embed_dim": 64, "num_heads": 4, "depth": 2}
    dense, units, tokens = tiny(**args), tiny(**args), tiny(**args)
    for vit in (dense, units, tokens):
        vit.mean, vit.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    grouped = load_method("grouped", criterion="magnitude", compensate=False)
    masks = {"blocks.0.mlp.fc1": 0.5, "blocks.1.mlp.fc1": 0.5}
    steps = (
        Step(pruner=grouped, thresholds={"blocks.0.mlp.neuron": 0.5, "blocks.1.mlp.neuron": 0.4}),
        Step(pruner=load_method("magnitude", pattern="2:4"), thresholds=masks),
    )
    Plan(steps=steps).apply(units)
    step = Step(pruner=load_method("tome"), thresholds={"blocks.0.token": 0.4})
    Plan(steps=(step,)).apply(tokens)
    records = [
        add(directory, "0000", dense, "dense"),
        add(directory, "0001", units, "finished"),
        add(directory, "0002", tokens, "finished"),
        add(directory, "0003", dense, "failed"),
    ]
    write_trials(directory / "trials.parquet", records)
    return directory


@pytest.mark.slow
def test_every_format_is_the_trials_model(sweep: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "small", io.StringIO()
    export_trial(sweep, "0001", out, said)
    assert {file.name for file in out.iterdir()} == ALL
    vit = PrunableViT.load(sweep / "models" / "0001" / "epoch-0001").eval()
    images = images_for(vit, 5)
    expected = vit(images).detach()
    alone = runpy.run_path(str(out / "load_timm.py"))["vit"]
    found = {
        "own": PrunableViT.load(out).eval()(images),
        "torch": torch.export.load(out / "model.pt2").module()(images),
        "onnx": torch.from_numpy(onnx_call(out / "model.onnx", images)()[0]),
        "timm": alone(images),
    }
    for name, logits in found.items():
        assert (logits - expected).abs().max() <= 1e-5, name
    described = json.loads((out / "shape.json").read_text())["measured"]
    assert (described["trial"], described["test_top1"]) == ("0001", 60.0)
    layers = json.loads((out / "semi_structured.json").read_text())
    assert layers["blocks.0.mlp.fc1"] == {"cusparselt": "taken", "cutlass": "taken"}
    assert layers["blocks.1.mlp.fc1"]["cusparselt"].startswith("it has 154 outputs")
    assert layers["blocks.1.mlp.fc2"]["cutlass"] == "its zeros are not 2:4 along the inputs"

    measured = json.loads((out / "measured.json").read_text())
    assert measured["images"] == "40 validation images"
    assert measured["largest_difference"] <= 1e-5
    assert measured["images_within_tolerance"] == 40
    assert measured["threads"] == 1
    runs = [(row["runtime"], row["batch"]) for row in measured["speed"]]
    assert runs == [(name, count) for count in (1, 64) for name in ("pytorch", "onnxruntime")]
    assert all(row["images_per_s"] > 0.0 for row in measured["speed"])

    lines = said.getvalue().splitlines()
    assert lines[0].startswith(f"wrote {out}, trial 0001: validation 61.2 %, test 60.0 %; grouped")
    assert {name for line in lines[1:-4] for name in re.findall(r"\w+\.\w+(?=[,:])", line)} == ALL
    scope: dict[str, object] = {"images": images}
    exec("\n".join(line.strip() for line in lines[-3:]), scope)
    assert torch.equal(scope["logits"], expected)

    # Another export takes its place as a whole: of what it does not write nothing stays.
    export_trial(sweep, "0002", out, said)
    gone = {"timm.safetensors", "load_timm.py", "semi_structured.json"}
    assert {file.name for file in out.iterdir()} == ALL - gone
    assert "not written: blocks.0 reduces the tokens" in said.getvalue()
    assert json.loads((out / "measured.json").read_text())["trial"] == "0002"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_goes_wrong_leaves_the_older_export(sweep: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "small"
    PrunableViT.load(sweep / "models" / "0000" / "epoch-0001").save(out, {"trial": "0000"})
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def absent(*_: object) -> None:
        raise ImportError("onnxscript is missing; ONNX needs it: pip install onnxscript")

    monkeypatch.setattr(export, "write_program", full)
    with pytest.raises(OSError, match="No space left"):
        export_trial(sweep, "0001", out, io.StringIO())
    monkeypatch.setattr(export, "write_program", absent)
    with pytest.raises(ValueError, match=r"^onnxscript is missing"):
        export_trial(sweep, "0001", out, io.StringIO())
    (sweep / "models" / "0001" / "epoch-0001" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or missing"):
        export_trial(sweep, "0001", out, io.StringIO())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("0009", r"^trial '0009' is not in .*; give one of \['0000', '0001', '0002', '0003'\]$"),
        ("0003", "^trial 0003 is failed; give one that finished$"),
    ],
)
def test_trials_without_a_model_are_refused(
    trial: str, message: str, sweep: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_trial(sweep, trial, tmp_path / "small", io.StringIO())
    assert not (tmp_path / "small").exists()


def test_only_an_export_is_replaced(tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_replaceable(out)
    out.mkdir()
    check_replaceable(out)
    tiny().save(out, {"trial": "0001"})
    check_replaceable(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds notes\.txt, which no export wrote"):
        check_replaceable(out)
    with pytest.raises(ValueError, match=r"notes\.txt is no directory"):
        check_replaceable(out / "notes.txt")
    saved = tmp_path / "saved"
    tiny().save(saved, {"val_top1": 50.0})
    with pytest.raises(ValueError, match="saved holds a model that no export wrote"):
        check_replaceable(saved)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ValueError, match="link is no directory"):
        check_replaceable(tmp_path / "link")


def test_images_are_the_sweeps_or_random(sweep: Path, sweep_file: Path, tiny) -> None:
    vit = tiny(patch_size=4)
    vit.mean, vit.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    images, source = example_images(sweep, vit)
    assert images.shape == (40, 3, 24, 16)
    assert source == "40 validation images"
    # Pixels of 0..255, normalised by 0.5 and 0.25: whole again when that is undone.
    pixels = (images * 0.25 + 0.5) * 255.0
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    (sweep_file.parent / "val.parquet").unlink()
    images, source = example_images(sweep, vit)
    assert images.shape == (64, 3, 24, 16)
    assert re.match(r"64 random images \(.*val\.parquet", source)
    assert torch.equal(images, example_images(sweep, vit)[0])
