from __future__ import annotations

import pytest
import torch

from pruners.model.class_masks import (
    RESOLUTION,
    ClassMasks,
    falling,
    pull_to,
    second_difference,
    uneven_slope,
)

CPU = torch.device("cpu")


def observed(classes, units, dims, slopes) -> ClassMasks:
    masks = ClassMasks(classes, units, dims, CPU)
    masks.observe(slopes, 8, 40)
    return masks


def example(copies: int = 1, scale: float = 1.0) -> ClassMasks:
    """Two heads of three dims and four neurons, for two classes; each of them `copies` times."""
    generator = torch.Generator().manual_seed(3)
    heads = torch.rand(2, 2, 3, generator=generator) + 0.1
    neurons = torch.rand(2, 4, generator=generator) ** 3
    slopes = [heads.repeat(1, copies, 1).flatten(1), neurons.repeat(1, copies)]
    return observed(2, [2 * copies, 4 * copies], [3, 1], [scale * s for s in slopes])


def mean_cost(masks: ClassMasks, costs: list[float]) -> float:
    means = [cost * v.detach().double().mean() for cost, v in zip(costs, masks.values, strict=True)]
    return (torch.stack(means).sum() / sum(costs)).item()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_masks_shrink_to_the_share_and_are_the_optimum_of_the_penalised_loss(share: float) -> None:
    masks, costs = example(), [2.0, 1.0]
    masks.shrink(costs, share)
    assert mean_cost(masks, costs) == pytest.approx(share, abs=1e-4)
    # From ones, h (1 - M) = nu w M: the loss's slope on a unit is one nu times that of the penalty.
    pulls = []
    for mask, curvature, width, cost in zip(
        masks.values, masks.curvatures(), masks.dims, costs, strict=True
    ):
        unit = mask.detach().unflatten(1, (-1, width))
        assert torch.equal(unit.amin(2), unit.amax(2))  # all dims of a head alike
        m, price = unit[..., 0], cost / mask.numel() * width  # of the whole unit
        pulls.append((curvature * (1.0 - m) / (price * m)).flatten())
    pulls = torch.cat(pulls)
    torch.testing.assert_close(pulls, pulls.mean().expand_as(pulls), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("copies", "scale"), [(10, 1.0), (1, 1e-4), (1, 1e3)])
def test_neither_more_units_nor_smaller_slopes_change_what_a_share_means(copies, scale) -> None:
    one, other = example(), example(copies, scale)
    for masks in (one, other):
        masks.shrink([2.0, 1.0], 0.4)
    for expected, found, width in zip(one.values, other.values, one.dims, strict=True):
        repeated = expected.detach().unflatten(1, (-1, width)).repeat(1, copies, 1).flatten(1)
        torch.testing.assert_close(found.detach(), repeated, rtol=1e-4, atol=1e-5)


def test_the_pull_is_that_of_a_bisection_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(3, n, generator=generator).double() for n in (4, 9)]
    rates = [torch.rand(3, n, generator=generator).double() ** 4 for n in (4, 9)]
    weights = [0.02, 0.05]

    def left(pull: float) -> float:
        parts = zip(masks, rates, weights, strict=True)
        return sum((w * (m / (1.0 + pull * r)).sum()).item() for m, r, w in parts)

    share = 0.8 * left(0.0)
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > share else (low, middle)
    assert pull_to(masks, rates, weights, share).item() == pytest.approx(low, rel=1e-6)
    assert pull_to(masks, rates, weights, 2.0 * left(0.0)) == 0.0


def test_a_whole_newton_step_ends_at_the_minimum_whatever_a_units_size() -> None:
    masks, curvature = ClassMasks(2, [2, 4], [3, 1], CPU), 0.7
    for square in masks.squares:
        square.fill_(curvature)
    # 0.7 / 2 (m - 0.4)^2 of a unit, whose slope its dims share.
    slopes = [
        torch.full_like(v, curvature * 0.6 / n)
        for v, n in zip(masks.values, masks.dims, strict=True)
    ]
    masks.descend(slopes, 1.0, 10**9, 1)
    for mask in masks.values:
        torch.testing.assert_close(mask.detach(), torch.full_like(mask, 0.4))
    masks.descend([torch.ones_like(v) for v in masks.values], 1.0, 10**9, 1)
    assert all(not mask.any() for mask in masks.values)  # harmful units go, and no further


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize(("images", "steps", "newton"), [(8, 40, 1.0), (16, 200, 3.0)])
def test_pure_noise_moves_no_mask_far(sigma, images, steps, newton) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = ClassMasks(4, [100], [1], CPU)
    masks.squares[0].fill_(sigma**2)
    for _ in range(steps):
        slope = sigma / images**0.5 * torch.randn(4, 100, generator=generator)
        masks.descend([slope], newton, images, steps)
    largest = 0.5 * newton / RESOLUTION**0.5  # where sigma^2 = RESOLUTION / images of the run
    assert masks.values[0].std() <= 1.1 * largest
    assert abs(masks.values[0].mean() - 1.0) < 0.05


def test_squares_are_a_plain_mean_first_and_remember_a_quarter_of_the_run() -> None:
    masks = ClassMasks(1, [1], [1], CPU)
    for slope in (1.0, 2.0, 3.0):
        masks.observe([torch.tensor([[slope]])], 8, 400)
    assert masks.squares[0].item() == pytest.approx(8 * 14.0 / 3.0)
    for _ in range(400):
        masks.observe([torch.tensor([[0.0]])], 8, 400)
    assert 0.0 < masks.squares[0].item() < 8 * 14.0 / 3.0 * 0.05


def test_without_slopes_masks_still_shrink_and_stay_finite() -> None:
    masks = observed(2, [2, 3], [3, 1], [torch.zeros(2, 6), torch.zeros(2, 3)])
    masks.descend([torch.zeros(2, 6), torch.zeros(2, 3)], 1.0, 8, 40)
    masks.shrink([1.0, 1.0], 0.7)
    assert mean_cost(masks, [1.0, 1.0]) == pytest.approx(0.7, abs=1e-3)


def test_the_share_falls_along_a_line() -> None:
    shares = [falling(t, 0.2, 0.6, 0.3) for t in (0.0, 0.2, 0.4, 0.6, 1.0)]
    assert shares == pytest.approx([1.0, 1.0, 0.65, 0.3, 0.3])


@pytest.mark.parametrize("over", ["units", "classes"])
@pytest.mark.parametrize("run", [3, 4, 12])
def test_the_slope_of_unevenness_is_autograds(over: str, run: int) -> None:
    mask = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
    x = mask.unflatten(1, (-1, run)) if over == "units" else mask.t()
    (slope,) = torch.autograd.grad(second_difference(x).abs().sum(), mask)
    torch.testing.assert_close(uneven_slope(mask.detach(), run, over), slope)


def test_unevenness_does_not_cross_heads_and_needs_three() -> None:
    mask = torch.tensor([[0.0, 1.0, 2.0, 9.0, 7.0, 5.0], [1.0] * 6])
    assert not uneven_slope(mask, 3, "units").any()
    assert uneven_slope(mask, 6, "units").any()
    assert not uneven_slope(mask, 2, "units").any()
    assert not uneven_slope(mask, 6, "classes").any()  # of two classes
    classes = torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    assert uneven_slope(classes, 1, "classes").flatten().tolist() == [0.0, 1.0, -2.0, 1.0]
