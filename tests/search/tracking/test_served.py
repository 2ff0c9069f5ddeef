from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mlflow.models import Model

from pruners import PrunableViT
from search.check import check
from search.data.splits import open_split
from search.records.digests import directory_digest
from search.sweep.spec import Sweep
from search.tracking import served as module
from search.tracking.served import Served, make_served
from tests.search.made import Made

DIGESTS = {"model": "aa", "data.val": "bb"}


def logits(made: Made, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return made.vit(torch.from_numpy(images)).numpy()


def copied(made: Made, folder: Path) -> Sweep:
    """The same sweep, elsewhere."""
    shutil.copytree(made.sweep.directory, folder / made.sweep.name)
    return made.sweep.model_copy(update={"storage": str(folder)})


def serve(made: Made, sweep: Sweep) -> Served:
    return make_served(sweep, made.member, 0.45, DIGESTS, 59.25)


def test_it_says_what_it_takes_and_where_it_comes_from(made: Made) -> None:
    model = Model.load(made.served.directory)
    (given,), (returned,) = model.signature.inputs.inputs, model.signature.outputs.inputs
    assert (given.shape, given.type) == ((-1, 3, 24, 16), np.dtype("float32"))
    assert (returned.shape, returned.type) == ((-1, 5), np.dtype("float32"))
    metadata = model.metadata
    assert (metadata["sweep"], metadata["trial"]) == ("tiny", "0007")
    assert (metadata["val_top1"], metadata["test_top1"]) == (61.5, 59.25)
    assert (metadata["cost"], metadata["cost_ratio"]) == ("effective_gmacs", 0.45)
    assert (metadata["mean"], metadata["std"]) == ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    assert metadata["classes"] == ["a", "b", "c", "d", "e"]
    assert (metadata["plan"], metadata["digests"]) == (made.member.plan, DIGESTS)


def test_its_example_is_the_first_validation_images(made: Made) -> None:
    model = Model.load(made.served.directory)
    example = model.load_input_example(str(made.served.directory))
    images = open_split(made.sweep, check(made.sweep)[0], "val")
    first, _ = next(images.batches(2, seed=None, augment=False))
    np.testing.assert_allclose(example, first.numpy(), rtol=1e-6)


def test_nothing_in_it_is_pickled_and_no_more_packages_are_needed_than_it_needs(made: Made) -> None:
    files = [path for path in made.served.directory.rglob("*") if path.is_file()]
    known = {"MLmodel", "model.onnx", "model.safetensors", "shape.json", "conda.yaml"}
    known |= {"python_env.yaml", "requirements.txt"}
    assert {f.name for f in files} == {*known, "input_example.json", "serving_input_example.json"}
    for path in files:
        start = path.read_bytes()[:2]
        assert start[:1] != b"\x80"  # a pickle's first opcode
        assert start != b"PK"  # the archives of torch.save
    needed = (made.served.directory / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in needed) == ["mlflow", "onnx", "onnxruntime"]


def test_its_extra_files_open_as_the_model_with_what_was_measured(made: Made) -> None:
    folder = made.served.directory / "extra_files"
    images = torch.randn(3, 3, 24, 16)
    assert torch.equal(PrunableViT.load(folder).eval()(images), made.vit(images))
    said = json.loads((folder / "shape.json").read_text())["measured"]
    assert (said["trial"], said["val_top1"], said["test_top1"]) == ("0007", 61.5, 59.25)


LOAD = """
import json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("pruners", "search", "cluster", "torch", "timm"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(numpy.load(sys.argv[2], allow_pickle=False))
json.dump(found["logits"].tolist(), sys.stdout)
"""


@pytest.mark.slow
def test_it_loads_where_neither_this_project_nor_torch_is(made: Made, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 24, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", LOAD, str(made.served.directory), str(tmp_path / "images.npy")]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 0, answer.stderr
    np.testing.assert_allclose(json.loads(answer.stdout), logits(made, images), atol=1e-4)


def test_it_is_verified_and_its_digest_is_that_of_its_files(made: Made) -> None:
    assert made.served.verified
    assert 0.0 < made.served.difference < 1e-5
    assert made.served.reason == ""
    assert made.served.digest == directory_digest(made.served.directory)


def test_it_is_made_once_unless_it_is_damaged(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a driver that goes on where another one died."""
    exports: list[Path] = []

    def export(vit: PrunableViT, path: Path) -> None:
        exports.append(path)
        shutil.copyfile(made.served.directory / "model.onnx", path)

    monkeypatch.setattr(module, "write_onnx", export)
    sweep = copied(made, tmp_path)
    first = serve(made, sweep)
    assert (first.digest, first.difference) == (made.served.digest, made.served.difference)
    assert exports == []
    file, left = first.directory / "requirements.txt", first.directory.with_name(".0007.host.1")
    whole = file.read_text()
    file.write_text(whole + "x")
    left.mkdir()
    mended = serve(made, sweep)
    assert len(exports) == 1
    assert mended.digest == directory_digest(first.directory) != first.digest  # it holds the time
    assert file.read_text() == whole
    assert sorted(path.name for path in left.parent.iterdir()) == ["0007", "0007.json"]
    assert module.read_served(left.parent, "0007", "of other weights") is None


def test_what_computes_something_else_is_not_verified(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(vit: PrunableViT, path: Path) -> None:
        model = onnx.load(made.served.directory / "model.onnx")
        (bias,) = (one for one in model.graph.initializer if one.name.endswith("head.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[2] += 3e-4
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(module, "write_onnx", wrong)
    sweep = copied(made, tmp_path)
    shutil.rmtree(sweep.directory / "served")
    served = serve(made, sweep)
    assert not served.verified
    assert served.difference == pytest.approx(3e-4, rel=0.05)
    assert served.reason.startswith("its logits in onnxruntime are 3.0e-04 from PyTorch's at most")
    assert serve(made, sweep).reason == served.reason  # as it is read back


def test_a_trials_damaged_model_is_not_served(made: Made, tmp_path: Path) -> None:
    sweep = copied(made, tmp_path)
    weights = sweep.directory / made.member.checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or missing"):
        serve(made, sweep)
