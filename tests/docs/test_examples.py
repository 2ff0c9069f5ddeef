"""Code on pages that needs nothing beside it does what it says."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from pruners import Plan, PrunableViT, Step
from tests.docs.pages import blocks


def code(page: str, begin: str) -> str:
    """Return the one block of Python on a page that begins so."""
    (found,) = (block for block in blocks("python", [page]) if block.text.startswith(begin))
    return found.text


def test_a_model_is_pruned_in_someones_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(code("docs/use-a-model.md", "from pruners import Plan"), names)
    vit = names["vit"]
    assert isinstance(vit, PrunableViT)
    weight = dict(vit.linears())["blocks.0.mlp.fc1"].weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5)
    assert float(capsys.readouterr().out) > 0.5  # of about 1.25 GMACs


def test_the_new_method_of_the_page_prunes(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("random_weights")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclass looks
    exec(code("docs/extend.md", "from dataclasses"), module.__dict__)
    vit, other = tiny(), tiny()
    for model, seed in ((vit, 0), (other, 1)):
        step = Step(pruner=module.RandomWeights(seed=seed), thresholds={"blocks.1.mlp.fc1": 0.25})
        Plan(steps=(step,)).apply(model, [])
    weights = [dict(model.linears())["blocks.1.mlp.fc1"].weight == 0 for model in (vit, other)]
    assert [float(gone.float().mean()) for gone in weights] == pytest.approx([0.25, 0.25], abs=1e-3)
    assert not torch.equal(*weights)
