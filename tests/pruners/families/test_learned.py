from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from pruners import cost_of, load_method, method_names
from pruners.families.learned import Learned, LearnedPruner, cutoff, places
from pruners.model.compensation import compensate
from pruners.training.learner import LearningData

LEARNERS = [name for name in method_names() if isinstance(load_method(name), LearnedPruner)]


class StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    name: str, tiny, batches, tmp_path
) -> None:
    vit, method = tiny(), load_method(name, epochs=8)
    data, file = LearningData.of(batches), tmp_path / "learning.pt"
    whole = method.learn(vit, data)
    for stop in (1, 3, 7):  # in whatever stages a method has

        def train(epoch: int, stop: int = stop):
            if epoch == stop:
                raise StoppedError
            return batches

        with pytest.raises(StoppedError):
            method.learn(vit, dataclasses.replace(data, train=train), file)
    resumed = method.learn(vit, data, file)
    assert all(torch.equal(resumed.scores[s], whole.scores[s]) for s in whole.scores)
    assert all(torch.equal(resumed.weights[n], whole.weights[n]) for n in whole.weights)
    assert {**resumed.report, "seconds": 0.0} == {**whole.report, "seconds": 0.0}


def bright_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose class is their brightness, so that there is something to keep."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (count, 8), generator=generator)
    noise = torch.randn(count, 8, 3, 24, 16, generator=generator)
    return [(n + y.view(-1, 1, 1, 1) - 2.0, y) for n, y in zip(noise, labels, strict=True)]


REACHED = {
    "wdpruning": "remaining_params",
    "uvc": "remaining_macs",
    "cait_channels": "remaining_macs",
}
"""Method that learns for a budget -> the share that its report says is left."""


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "mlp_ratio"), [(12, 4.0), (120, 40.0)])
@pytest.mark.parametrize("name", [*REACHED, "vit_slim"])  # x_pruner has a test of its own
def test_defaults_act_in_runs_of_ten_times_the_steps_and_neurons(
    name: str, steps: int, mlp_ratio: float, tiny
) -> None:
    vit = tiny(depth=2, num_heads=6, mlp_ratio=mlp_ratio)
    options = {"least_dims": 1} if name == "cait_channels" else {}  # heads here have 4 dims
    data = LearningData.of(bright_batches(steps // 4))  # 4 epochs by default
    learned = load_method(name, **options).learn(vit, data)
    if name in REACHED:
        within = 0.06 if steps > 12 else 0.1  # of blocks and heads, in 6 steps of search
        assert learned.report[REACHED[name]] == pytest.approx(0.5, abs=within)
    for site, scores in learned.scores.items():
        if site.endswith("neuron"):  # units are told apart
            assert len(scores.unique()) > len(scores) / 2, site
    if name == "vit_slim":
        assert -0.2 < learned.report["mask_mean"] < 0.9
        assert learned.report["mask_std"] > 0.05


def test_what_was_learned_survives_saving_and_weights_can_be_left(tiny, batches, tmp_path) -> None:
    vit, data = tiny(), LearningData.of(batches)
    learned = load_method("x_pruner", mask_epochs=1, epochs=1).learn(vit, data)
    learned.save(tmp_path / "x.safetensors")
    again = Learned.load(tmp_path / "x.safetensors")
    assert again.report == learned.report
    assert all(torch.equal(again.scores[s], learned.scores[s]) for s in learned.scores)
    assert set(again.weights) == set(vit.vit.state_dict())
    assert again.by_class.keys() == learned.by_class.keys() == learned.scores.keys()
    assert all(torch.equal(again.by_class[s], masks) for s, masks in learned.by_class.items())
    kept = load_method("x_pruner", mask_epochs=1, epochs=1, keep_weights=False).learn(vit, data)
    assert not kept.weights
    (tmp_path / "torn.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="does not hold learned scores"):
        Learned.load(tmp_path / "torn.safetensors")


@dataclass(frozen=True, kw_only=True)
class Known(LearnedPruner):
    """A method whose margins are given."""

    units: tuple[str, ...] = ("ragged_v_dim", "neuron", "block")
    whole_kinds: ClassVar[tuple[str, ...]] = ("ragged_v_dim",)

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        return ("ragged_v_dim", "neuron", "block")

    def learner(self, vit, data):
        raise AssertionError("nothing is learned")


def margins(method: Known, shape, blocks=(0.5, 0.5, 0.5)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {s: torch.rand(n, generator=generator) - 0.3 for s, n in method.sites(shape).items()}
    return found | {f"blocks.{i}.block": torch.tensor([m]) for i, m in enumerate(blocks)}


def test_at_the_learned_cost_the_allocation_is_the_learned_one(tiny) -> None:
    method, shape = Known(), tiny().shape()
    scores = margins(method, shape, blocks=(0.5, -0.1, 0.5))
    learned = {s: (m < 0.0).double().mean().item() for s, m in scores.items()}
    wanted = method.shrink(shape, learned)
    assert wanted.blocks[1].heads == 0
    found = method.allocate(shape, scores, cost_of(wanted).effective_macs)
    assert method.shrink(shape, found) == wanted


def test_blocks_go_lowest_first_and_only_while_the_budget_is_not_undershot(tiny) -> None:
    method, shape = Known(), tiny().shape()
    dense = cost_of(shape).effective_macs
    scores = margins(method, shape, blocks=(-0.1, 0.4, -0.2))

    def present(budget: float) -> list[bool]:
        left = method.shrink(shape, method.allocate(shape, scores, budget * dense))
        assert budget - 0.12 < cost_of(left).effective_macs / dense <= budget
        return [block.heads > 0 for block in left.blocks]

    assert present(0.9) == [True, True, True]
    assert present(0.6) == [True, True, False]
    assert present(0.3) == [False, True, False]


def test_a_block_that_is_wanted_goes_only_if_the_budget_needs_it(tiny) -> None:
    method, shape = Known(units=("neuron", "block")), tiny().shape()
    scores = margins(Known(), shape, blocks=(0.5, 0.3, 0.4))
    scores = {s: m for s, m in scores.items() if s in method.sites(shape)}
    dense = cost_of(shape).effective_macs
    least = method.shrink(shape, {f"blocks.{i}.mlp.neuron": 0.995 for i in range(3)})
    macs = 0.9 * cost_of(least).effective_macs  # the heads alone cost more
    left = method.shrink(shape, method.allocate(shape, scores, macs))
    assert [block.heads for block in left.blocks] == [3, 0, 3]
    with pytest.raises(ValueError, match="out of reach"):
        method.allocate(shape, scores, 0.001 * dense)


def test_where_only_blocks_can_go_they_do(tiny) -> None:
    method, shape = Known(units=("block",)), tiny().shape()
    scores = {f"blocks.{i}.block": torch.tensor([m]) for i, m in enumerate((-0.1, 0.4, -0.2))}
    dense = cost_of(shape).effective_macs
    assert method.allocate(shape, scores, 0.9 * dense) == {"blocks.2.block": 1.0}
    with pytest.raises(ValueError, match="out of reach"):
        method.allocate(shape, scores, 0.001 * dense)


def test_another_budget_is_another_method_where_it_matters() -> None:
    method = load_method("x_pruner", budget=0.5)
    assert method.for_budget(0.7) == load_method("x_pruner", budget=0.7)
    ranked = load_method("x_pruner", thresholds="global")
    assert ranked.for_budget(0.7) == ranked
    with pytest.raises(ValueError, match=r"option budget of x_pruner is 1\.5"):
        method.for_budget(1.5)


def some_units() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Importances of two sites, and what their units cost together: 0.1 and 0.2 each."""
    importance = {"a": torch.tensor([0.9, 0.1, 0.4]), "b": torch.tensor([0.5, 0.2])}
    return importance, {"a": 0.3, "b": 0.4}


def test_a_units_place_is_the_cost_that_ranks_lower_and_half_its_own() -> None:
    importance, costs = some_units()
    found = places({site: 1e3 * scores for site, scores in importance.items()}, costs)
    torch.testing.assert_close(found["a"], torch.tensor([0.65, 0.05, 0.35]))
    torch.testing.assert_close(found["b"], torch.tensor([0.5, 0.2]))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.29, 0.3, 0.5, 0.7, 2.0])
def test_below_the_cutoff_lies_the_smallest_set_of_lowest_units_of_a_share(share: float) -> None:
    importance, costs = some_units()
    limit = cutoff(importance, costs, share)
    ranked = sorted(
        (score.item(), costs[site] / len(scores))
        for site, scores in importance.items()
        for score in scores
    )
    wanted = [sum(c for _, c in ranked[:n]) < share - 1e-6 for n in range(len(ranked))]
    assert [score < limit for score, _ in ranked] == wanted
    raised = cutoff({site: scores + 3.0 for site, scores in importance.items()}, costs, share)
    torch.testing.assert_close(raised, limit + 3.0)


def test_what_was_learned_is_solved_toward_the_model_as_it_came(tiny, batches) -> None:
    """Learned weights that are wrong in a linear layer alone are mended; nothing else knows how."""
    dense, method = tiny(), load_method("x_pruner")
    weights = {name: tensor.clone() for name, tensor in dense.vit.state_dict().items()}
    weights["blocks.1.mlp.fc2.weight"] *= 0.5
    weights["blocks.1.mlp.fc2.bias"] += 1.0
    shape = dense.shape()
    scores = {site: torch.arange(float(n)) for site, n in method.sites(shape).items()}
    learned = Learned(scores=scores, weights=weights)
    with torch.no_grad():
        dense.blocks[0].mlp.fc2.weight[:, 0] = 0.0  # neuron 0, which goes, says nothing
    learned.weights["blocks.0.mlp.fc2.weight"][:, 0] = 0.0
    vit = copy.deepcopy(dense)
    uncut = method.cut_known(vit, batches, learned, {"blocks.0.mlp.neuron": 1 / 96})
    assert uncut is not None
    images = batches[0][0]
    with torch.no_grad():
        expected = dense.eval()(images)
        assert (vit.eval()(images) - expected).abs().max() > 0.1
        compensate(vit, uncut, batches, damping=1e-6)
        torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-4)
    assert vit.shape().blocks[0].hidden == 95
