from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from search import export_speed
from search.export_speed import measure_speed


@pytest.mark.parametrize(("per_image", "batch"), [(0.01, 64), (0.5, 16), (20.0, 1)])
def test_rates_and_ratios(per_image: float, batch: int, tiny, monkeypatch) -> None:
    """The clock is replaced; in every third round all takes five times as long."""
    ran: list[tuple[str, int]] = []

    def in_turn(
        calls: Sequence[Callable[[], object]], *, rounds: int, warmup: int = 1
    ) -> list[list[float]]:
        for call in calls:
            call()
        count = ran[-1][1]
        factors = [1.0, 0.5, 0.25, 0.125]  # dense and own in PyTorch, then in onnxruntime
        busy = [5.0 if turn % 3 == 2 else 1.0 for turn in range(rounds)]
        return [[per_image * factor * count * b for b in busy] for factor in factors]

    def onnx_call(path: Path, images: torch.Tensor) -> Callable[[], None]:
        return lambda: ran.append((path.name, len(images)))

    monkeypatch.setattr(export_speed, "seconds_in_turn", in_turn)
    monkeypatch.setattr(export_speed, "onnx_call", onnx_call)
    images = torch.randn(5, 3, 24, 16)
    speeds = measure_speed(tiny(), tiny(), (Path("dense.onnx"), Path("own.onnx")), images)
    assert [(s.runtime, s.batch) for s in speeds] == [
        ("pytorch", 1),
        ("onnxruntime", 1),
        ("pytorch", batch),
        ("onnxruntime", batch),
    ]
    assert set(ran) == {
        (f"{name}.onnx", count) for name in ("dense", "own") for count in (1, batch)
    }
    for speed in speeds:
        assert speed.faster == pytest.approx(2.0)
        assert speed.images_per_s == pytest.approx(2.0 * speed.dense_images_per_s)
        assert 2 <= speed.rounds <= 30
        dense = 1.0 if speed.runtime == "pytorch" else 0.25
        assert speed.dense_images_per_s == pytest.approx(1.0 / (per_image * dense))
