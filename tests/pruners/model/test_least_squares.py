from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pruners.model.least_squares import Moments, ridge


def data(inputs: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    a = torch.randn(90, inputs, generator=generator, dtype=torch.float64) @ mix + 4.0
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(90, outputs, generator=generator, dtype=torch.float64)
    return a, a @ w.T + 0.3 * noise - 2.0


def moments(a: Tensor, y: Tensor, parts: tuple[int, ...] = (40, 1, 49)) -> Moments:
    found = Moments()
    for some_a, some_y in zip(a.split(parts), y.split(parts), strict=True):
        found.add(some_a, some_y)
    return found


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_it_is_what_a_solver_of_least_squares_finds(damping: float, biased: bool) -> None:
    a, y = data()
    centred = a - a.mean(0) if biased else a
    scale = centred.square().mean()
    # Ridge as plain least squares: rows that pull the weights to zero, none for the constant.
    pull = np.sqrt(len(a) * damping * scale.item()) * np.eye(a.shape[1])
    ones, none = np.ones((len(a), int(biased))), np.zeros((a.shape[1], int(biased)))
    system = np.block([[a.numpy(), ones], [pull, none]])
    wanted, *_ = np.linalg.lstsq(system, np.vstack([y, np.zeros((a.shape[1], 3))]), rcond=None)
    found = moments(a, y).correction(damping, biased=biased)
    assert found is not None
    assert np.allclose(found.weight, wanted[:7].T, atol=1e-9)
    assert np.allclose(found.bias, wanted[7] if biased else 0.0, atol=1e-9)


def test_means_and_covariances_are_numpys() -> None:
    a, y = data()
    found = moments(a, y)
    both = np.cov(np.hstack([y, a]), rowvar=False, bias=True)
    aa, ya = found.covariances()
    assert np.allclose(aa, both[3:, 3:])
    assert np.allclose(ya, both[:3, 3:])
    assert np.allclose(found.means()[0], a.mean(0))
    assert np.allclose(found.means()[1], y.mean(0))


def test_large_means_do_not_drown_small_covariances() -> None:
    a, y = data()
    aa, _ = moments((a / 100 + 3e3).float(), y.float()).covariances()
    assert np.allclose(aa, np.cov(a / 100, rowvar=False, bias=True), rtol=0.02, atol=1e-3)


def test_constant_inputs_get_no_weight() -> None:
    a, y = data()
    found = moments(torch.full_like(a, 2.0), y).correction(1e-3)
    assert found is not None
    assert bool((found.weight == 0.0).all())
    assert torch.allclose(found.bias, y.mean(0))


def test_what_is_not_positive_definite_is_not_solved() -> None:
    aa = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    assert ridge(aa, torch.ones(1, 2, dtype=torch.float64), 1e-3) is None
    assert ridge(aa * float("nan"), torch.ones(1, 2, dtype=torch.float64), 1e-3) is None
