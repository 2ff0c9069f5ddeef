from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pruners import Plan, PrunableViT, Step, load_method
from pruners.checkpoint import read_description
from tests.models import TINY, images_for


def pruned(tiny) -> PrunableViT:
    vit = tiny(img_size=(48, 32))
    units = load_method(
        "grouped",
        criterion="magnitude",
        units=["head", "qk_dim", "v_dim", "neuron"],
        compensate=False,
    )
    thresholds = {
        "blocks.0.attn.head": 1.0,
        "blocks.1.attn.head": 0.3,
        "blocks.1.attn.qk_dim": 0.5,
        "blocks.2.mlp.neuron": 1.0,
    }
    Plan(
        steps=(
            Step(pruner=units, thresholds=thresholds | {"blocks.2.attn.v_dim": 0.4}),
            Step(pruner=load_method("evit", fuse=False), thresholds={"blocks.1.token": 0.4}),
            Step(pruner=load_method("magnitude"), thresholds={"blocks.1.mlp.fc1": 0.6}),
        )
    ).apply(vit)
    return vit


def test_a_pruned_model_opens_again_without_its_plan(tiny, tmp_path) -> None:
    vit = pruned(tiny)
    vit.mean, vit.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    vit.save(tmp_path / "a", measured={"val_top1": 71.5})
    again = PrunableViT.load(tmp_path / "a").eval()
    images = images_for(vit)
    assert torch.equal(again(images), vit(images))
    assert again.shape() == vit.shape()
    assert (again.mean, again.std) == (vit.mean, vit.std)
    assert torch.equal(again.masks["blocks.1.mlp.fc1"], vit.masks["blocks.1.mlp.fc1"])
    assert read_description(tmp_path / "a")["measured"] == {"val_top1": 71.5}
    again.save(tmp_path / "b", measured={"val_top1": 71.5})
    for file in ("model.safetensors", "shape.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_nothing_temporary_is_left_behind(tiny, tmp_path) -> None:
    tiny().save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "shape.json"]


def test_an_unknown_architecture_cannot_be_saved(tmp_path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    with pytest.raises(ValueError, match="arch of this model is unknown; build it with from_timm"):
        PrunableViT(VisionTransformer(**TINY)).save(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("shape"), "lacks 'shape'"),
        (lambda d: d.update(format=9), "not of format 2"),
        (lambda d: d["shape"]["blocks"][1].update(hidden=95), r"blocks\.1\.mlp.*needs"),
        (lambda d: d["shape"]["blocks"][1].update(hidden=97), r"blocks\.1.*96.* at most"),
        (lambda d: d["shape"]["nonzero"].update({"blocks.1.mlp.fc1": 3}), "its shape says 3"),
        (
            lambda d: d["token_step"].update(method="magnitude", options={}),
            "give a token method",
        ),
        (lambda d: d["shape"].update(dim=25), "dim of the shape is 25; the architecture has 24"),
        (lambda d: d["shape"].update(dim=0), "dim of the shape is 0; the architecture has 24"),
        (lambda d: d["arch"]["args"].update(depth=4), "3 blocks; the architecture has 4"),
        (lambda d: d["shape"]["nonzero"].update(x=3), "nonzero has 'x', which is no layer"),
        (lambda d: d["shape"]["blocks"][1].update(heads=-1), r"heads of blocks\.1.* is -1; give"),
        (lambda d: d["shape"]["blocks"].append(7), r"blocks\.3 of the shape is 7"),
        (lambda d: d["shape"].update(qk_norm=1), "qk_norm of the shape is 1; give true or false"),
        (lambda d: d["shape"].update(image=[48]), r"image of the shape is \[48\]; give height"),
        (lambda d: d["input"].update(std=[0.0, 1.0, 1.0]), r"input\.std is \[0\.0, 1\.0, 1\.0\]"),
        (lambda d: d["input"].update(mean="abc"), r"input\.mean is 'abc'; give 3 numbers"),
        (lambda d: d["arch"].update(args=[]), r"arch\.args is \[\]; give a table"),
        (lambda d: d["token_step"].update(method="../x"), r"method '\.\./x' does not exist"),
        (
            lambda d: d["token_step"]["options"].update(ramp_epochs="x"),
            "ramp_epochs of evit is 'x'; give a whole number",
        ),
        (lambda d: d["token_step"]["thresholds"].update(x=0.5), "'x' names no site of evit"),
        (lambda d: d["shape"].update(outer_params=1), "another shape than its shape.json says"),
    ],
)
def test_a_damaged_description_is_refused_by_name(damage, message: str, tiny, tmp_path) -> None:
    pruned(tiny).save(tmp_path)
    description = json.loads((tmp_path / "shape.json").read_text())
    damage(description)
    (tmp_path / "shape.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        PrunableViT.load(tmp_path)


def test_torn_files_are_refused_by_name(tiny, tmp_path) -> None:
    tiny().save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        PrunableViT.load(tmp_path)
    (tmp_path / "shape.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        PrunableViT.load(tmp_path)
    (tmp_path / "shape.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"written by PrunableViT.save"):
        PrunableViT.load(tmp_path)


def test_plain_safetensors_with_and_without_metadata(tiny, tmp_path) -> None:
    vit = tiny()
    state = {k: v.contiguous() for k, v in vit.vit.state_dict().items()}
    save_file(state, tmp_path / "with.safetensors", {"arch": json.dumps(TINY)})
    save_file(state, tmp_path / "without.safetensors")
    images = images_for(vit)
    assert torch.equal(
        PrunableViT.from_safetensors(tmp_path / "with.safetensors").eval()(images), vit(images)
    )
    explicit = PrunableViT.from_safetensors(tmp_path / "without.safetensors", **TINY).eval()
    assert torch.equal(explicit(images), vit(images))
    with pytest.raises(ValueError, match="says nothing of its architecture; give name or args"):
        PrunableViT.from_safetensors(tmp_path / "without.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PrunableViT.from_safetensors(tmp_path / "nothing.safetensors")
