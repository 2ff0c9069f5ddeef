from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from pruners import load_method
from search.sweep.toml import load_sweep
from search.trial.inputs import TrialInputs, pack, unpack
from tests.models import VARIANTS, images_for


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_the_same_after_it_was_taken_apart(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    load_method("magnitude").prune(vit, (), {"blocks.0.mlp.fc1": 0.5})
    vit.blocks[0].norm1.requires_grad_(False)
    again = unpack(*pack(vit))
    images = images_for(vit)
    assert torch.equal(again(images), vit(images))
    assert again.shape() == vit.shape()
    assert (again.arch, again.training) == (vit.arch, False)
    for ours, theirs in zip(again.parameters(), vit.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_travel_outside_the_pickle_and_are_read_where_they_lie(
    dtype: torch.dtype, tiny, sweep_file, recwarn
) -> None:
    dense = tiny().to(dtype)
    sweep = load_sweep(sweep_file)
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(
        TrialInputs(sweep=sweep, dense=dense, start=dense, directory=Path()),
        protocol=5,
        buffer_callback=buffers.append,
    )
    size = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    assert sum(len(buffer.raw()) for buffer in buffers) == size
    assert b"".join(buffer.raw() for buffer in buffers)[:64] not in sent
    shared = [memoryview(bytes(buffer.raw())) for buffer in buffers]  # read-only, as Ray's are
    received = pickle.loads(sent, buffers=shared)
    assert not recwarn.list
    assert received.sweep == sweep
    theirs = dense.state_dict()
    for name, tensor in received.dense.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    places = {torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in shared}
    assert {p.data_ptr() for p in received.dense.parameters()} <= places
    assert received.start is received.dense
    trained = copy.deepcopy(received.dense)
    assert not {p.data_ptr() for p in trained.parameters()} & places
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    assert torch.equal(received.dense.vit.head.bias, dense.vit.head.bias)
