from __future__ import annotations

import torch

from pruners.latency.timing import forward_call, seconds_in_turn


def test_calls_take_turns_and_warmup_does_not_count() -> None:
    called: list[str] = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    times = seconds_in_turn(calls, rounds=3, warmup=2)
    assert called == ["a", "a", "b", "b"] * 5  # the first call of two does not count
    assert [len(taken) for taken in times] == [3, 3]
    assert all(second > 0.0 for taken in times for second in taken)


def test_forward_is_that_of_the_model(tiny, batches) -> None:
    vit, images = tiny(), batches[0][0]
    logits = forward_call(vit, images)()
    assert torch.equal(logits, vit(images))
    assert logits.is_inference()
