from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pruners.saliency.kronecker import Factors
from pruners.saliency.removal import ORDERED, Removal, dim_costs, head_costs, shared_costs


def random_factors(inputs: int, outputs: int) -> tuple[Tensor, Factors]:
    generator = torch.Generator().manual_seed(inputs + outputs)
    a = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64)
    g = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, Factors(inputs=a.T @ a / len(a), outputs=g @ g.T)


def loss_without(weight: Tensor, factors: Factors, gone: list[int], damping: float) -> float:
    """The least 1/2 tr(G D H D^T) over changes D of the weights by which those of `gone` vanish."""
    h = factors.inputs
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    kept = [i for i in range(len(h)) if i not in gone]
    change = -weight.clone()
    change[:, kept] = (
        weight[:, gone] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, gone]).T
        if kept
        else change[:, kept]
    )
    return 0.5 * torch.trace(factors.outputs @ change @ h @ change.T).item()


def test_costs_are_the_loss_after_the_best_adjustment() -> None:
    weight, factors = random_factors(6, 4)
    costs = Removal(weight, factors, 0.01).costs()
    for i in range(6):
        assert costs[i].item() == pytest.approx(loss_without(weight, factors, [i], 0.01))
    groups = Removal(weight, factors, 0.01).group_costs(2)
    for i in range(3):
        wanted = loss_without(weight, factors, [2 * i, 2 * i + 1], 0.01)
        assert groups[i].item() == pytest.approx(wanted)


def test_the_second_costs_what_both_cost_less_the_first() -> None:
    weight, factors = random_factors(6, 4)
    for first, second in itertools.permutations(range(6), 2):
        removal = Removal(weight, factors, 0.01)
        before = removal.costs()[first].item()
        removal.remove(torch.tensor([first]))
        after = removal.costs()[second - (second > first)].item()
        assert before + after == pytest.approx(loss_without(weight, factors, [first, second], 0.01))


@pytest.mark.parametrize("inputs", [5, 150])  # once with less and once with more than is compacted
def test_one_by_one_takes_the_cheapest_of_what_is_left(inputs: int) -> None:
    weight, factors = random_factors(inputs, 4)
    found = Removal(weight, factors, 0.01).one_by_one()
    removal, reached = Removal(weight, factors, 0.01), 0.0
    while len(removal.left):
        costs = removal.costs()
        cheapest = int(costs.argmin())
        reached = max(reached * (1.0 + ORDERED), costs[cheapest].item())
        assert found[removal.left[cheapest]].item() == pytest.approx(reached, rel=1e-6)
        removal.remove(torch.tensor([cheapest]))


def test_the_second_of_twins_is_dear() -> None:
    weight, factors = random_factors(6, 4)
    twin = torch.eye(6, dtype=torch.float64)
    twin[:, 5] = twin[:, 0]
    h = twin.T @ factors.inputs @ twin  # the last input is a copy of the first
    alone = Removal(weight, Factors(inputs=h, outputs=factors.outputs), 1e-6)
    assert alone.costs()[[0, 5]].max() < 1e-3 * alone.costs()[1:5].min()
    alone.remove(torch.tensor([5]))
    assert alone.costs()[0] > 1e-2 * alone.costs().max()


def test_heads_go_as_a_whole_and_dims_one_from_each_head() -> None:
    weight, factors = random_factors(6, 4)
    heads = head_costs(Removal(weight, factors, 0.01), 2)
    first = int(heads.argmin())
    wanted = loss_without(weight, factors, [2 * first, 2 * first + 1], 0.01)
    assert heads.min().item() == pytest.approx(wanted)
    dims = dim_costs(Removal(weight, factors, 0.01), 2)  # two heads of three
    assert dims.shape == (2, 3)
    gone = [int(dims[0].argmin())]
    assert dims[0].min().item() == pytest.approx(loss_without(weight, factors, gone, 0.01))
    gone.append(3 + int(dims[1].argmin()))
    both = loss_without(weight, factors, gone, 0.01)
    assert dims[0].min().item() + dims[1].min().item() == pytest.approx(both)


def test_inputs_that_layers_share_cost_what_they_cost_in_all_of_them() -> None:
    layers = [random_factors(6, 4), random_factors(6, 5)]
    found = shared_costs([Removal(w, f, 0.01) for w, f in layers])
    first, second = found.argsort()[:2].tolist()
    for gone in ([first], [first, second]):
        wanted = sum(loss_without(w, f, gone, 0.01) for w, f in layers)
        assert found[gone].sum().item() == pytest.approx(wanted)
    alone = torch.stack([Removal(w, f, 0.01).costs() for w, f in layers]).sum(dim=0)
    assert first == int(alone.argmin())


def test_inputs_that_cannot_be_inverted_are_refused() -> None:
    weight, factors = random_factors(3, 2)
    broken = Factors(inputs=factors.inputs * float("nan"), outputs=factors.outputs)
    with pytest.raises(ValueError, match="curvature is not finite"):
        Removal(weight, broken, 0.01)
    negative = Factors(inputs=factors.inputs - 9.0 * torch.eye(3), outputs=factors.outputs)
    with pytest.raises(ValueError, match=r"damping = 0\.01; give a larger one"):
        Removal(weight, negative, 0.01)
