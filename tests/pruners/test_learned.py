from __future__ import annotations

import dataclasses

import pytest
import torch

from pruners import load_method
from pruners.gates import LearningData
from pruners.learned import Learned


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tiny, batches, tmp_path) -> None:
    vit, method = tiny(), load_method("x_pruner", mask_epochs=2, epochs=2)
    data, file = LearningData.of(batches), tmp_path / "learning.pt"
    whole = method.learn(vit, data)
    for stop in (1, 3):  # in stage 1, and in stage 2

        def train(epoch: int, stop: int = stop):
            if epoch == stop:
                raise StoppedError
            return batches

        with pytest.raises(StoppedError):
            method.learn(vit, dataclasses.replace(data, train=train), file)
    resumed = method.learn(vit, data, file)
    assert all(torch.equal(resumed.scores[s], whole.scores[s]) for s in whole.scores)
    assert all(torch.equal(resumed.weights[n], whole.weights[n]) for n in whole.weights)


def test_what_was_learned_survives_saving_and_weights_can_be_left(tiny, batches, tmp_path) -> None:
    vit, data = tiny(), LearningData.of(batches)
    learned = load_method("x_pruner", mask_epochs=1, epochs=1).learn(vit, data)
    learned.save(tmp_path / "x.safetensors")
    again = Learned.load(tmp_path / "x.safetensors")
    assert again.report == learned.report
    assert all(torch.equal(again.scores[s], learned.scores[s]) for s in learned.scores)
    assert set(again.weights) == set(vit.vit.state_dict())
    kept = load_method("x_pruner", mask_epochs=1, epochs=1, keep_weights=False).learn(vit, data)
    assert not kept.weights
    (tmp_path / "torn.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="does not hold learned scores"):
        Learned.load(tmp_path / "torn.safetensors")
