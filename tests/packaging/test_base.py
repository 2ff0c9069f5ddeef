"""What `pip install prunefront` alone brings is enough for methods and models."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import ROOT

JOURNEY = """
import torch
from pruners import Plan, PrunableViT, Step, load_method, method_names

methods = [load_method(name) for name in method_names()]
sizes = dict(img_size=(24, 16), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
vit = PrunableViT.from_timm("vit_tiny_patch16_224", pretrained=False, **sizes)
neurons = {f"blocks.{i}.mlp.neuron": 0.5 for i in range(3)}
steps = (
    Step(pruner=load_method("grouped"), thresholds=neurons),
    Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1": 0.5}),
)
images = torch.randn(2, 3, 24, 16)
Plan(steps=steps).apply(vit, [(images, torch.tensor([0, 1]))])
vit.eval().save("model")
again = PrunableViT.load("model")
assert torch.equal(again(images), vit(images))
print(len(methods), again.shape() == vit.shape(), again.shape().blocks[0].hidden)
"""


def base_alone(folder: Path) -> set[str]:
    """Link `pruners`, and the modules of the packages that the base brings, into a folder.

    Returns:
        The names of what is there.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in closure({Requirement(line).name for line in project["dependencies"]}):
        for file in importlib.metadata.files(name) or ():
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                path = Path(str(file.locate()))
                link.symlink_to([path, *path.parents][len(file.parts) - 1])
    (folder / "pruners").symlink_to(ROOT / "pruners")
    return {path.name for path in folder.iterdir()}


def closure(names: set[str]) -> set[str]:
    """Add what packages need, and what that needs."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        found.add(name)
        needed = [
            r
            for r in map(Requirement, lines)
            if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
        names |= {r.name for r in needed}
    return found


@pytest.mark.slow
def test_methods_and_models_need_the_base_alone(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    there = base_alone(packages)
    assert {"pruners", "torch", "timm", "numpy", "safetensors"} <= there
    brought_by_extras = {"ray", "optuna", "mlflow", "pyarrow", "pydantic", "rich", "onnx", "plotly"}
    assert not brought_by_extras & there
    done = subprocess.run(
        [sys.executable, "-ISc", f"import sys; sys.path.append({str(packages)!r})\n{JOURNEY}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["22", "True", "48"]
