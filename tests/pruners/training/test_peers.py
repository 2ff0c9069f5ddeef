"""Two processes fine-tune together; everything runs in one pair of them, whose start takes long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pruners.training.fine_tune import FineTuner, TrainingLeftError
from pruners.training.optimisation import NonFiniteLossError
from pruners.training.peers import PeerOutOfMemoryError, Peers
from pruners.training.recipe import Recipe
from tests.models import build_tiny

pytestmark = pytest.mark.slow
SIZE = 2
PLAIN = Recipe(epochs=2, distill=0.0, precision="float32", weight_decay=0.3, clip=1e9)
RECIPE = dataclasses.replace(PLAIN, distill=0.5)

Taught = list[tuple[Tensor, Tensor, Tensor]]


def taught() -> Taught:
    """Batches of 5, 6, 1 and 4 images: shares of different sizes, one of them of no image."""
    draw = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(count, 3, 24, 16, generator=draw),
            torch.randint(5, (count,), generator=draw),
            torch.randn(count, 5, generator=draw),
        )
        for count in (5, 6, 1, 4)
    ]


def share_of(batches: Taught, rank: int) -> Taught:
    return [tuple(part[rank::SIZE] for part in batch) for batch in batches]  # type: ignore[misc]


def tuner_of(recipe: Recipe, peers: Peers | None) -> FineTuner:
    vit = build_tiny()
    vit.unreached = nn.Parameter(torch.ones(2, 2))  # no loss depends on it
    tuner = FineTuner(vit, recipe, steps_per_epoch=4)
    tuner.peers = peers
    return tuner


def with_sgd(recipe: Recipe, parts: int, peers: Peers | None, batches: Taught) -> dict[str, Any]:
    """Two epochs in which nothing hides the scale of gradients, as Adam would."""
    tuner = tuner_of(recipe, peers)
    tuner.optimizer = torch.optim.SGD(tuner.vit.parameters(), lr=0.1)
    tuner.schedule = torch.optim.lr_scheduler.ConstantLR(tuner.optimizer, 1.0)
    tuner.parts = parts
    losses = [tuner.train_taught(batches) for _ in range(2)]
    return {"losses": losses, "weights": [p.detach() for p in tuner.vit.parameters()]}


def with_adam(peers: Peers | None, batches: Taught) -> Tensor:
    tuner = tuner_of(RECIPE, peers)
    tuner.train_taught(batches)
    return tuner.vit.unreached.detach()


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def left(peers: Peers, batches: Taught) -> int:
    """The second process is told to leave after two steps."""
    tuner = tuner_of(PLAIN, peers)
    try:
        tuner.train_taught(batches, lambda: peers.rank == 1 and tuner.steps == 2)
    except TrainingLeftError:
        return tuner.steps
    return -1


def ran_out(peers: Peers, batches: Taught) -> str:
    """The second process runs out of memory in its second step."""
    tuner = tuner_of(PLAIN, peers)
    loss_of = tuner.loss

    def limited(*batch: Any) -> Tensor:
        if peers.rank == 1 and tuner.steps == 1:
            raise MemoryError("full")
        return loss_of(*batch)

    tuner.loss = limited  # type: ignore[assignment]
    try:
        tuner.train_taught(batches)
    except MemoryError as error:
        return f"{type(error).__name__} after {tuner.steps}"
    return "none"


def not_finite(peers: Peers, batches: Taught) -> str:
    """Only the images of the second process are harmful."""
    (images, labels, answers), *others = batches
    if peers.rank == 1:
        images = images * float("nan")
    try:
        tuner_of(PLAIN, peers).train_taught([(images, labels, answers), *others])
    except NonFiniteLossError as error:
        return str(error)
    return "none"


def take_part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=SIZE)
    peers, own = Peers(out_of_memory), share_of(taught(), rank)
    found = {
        f"sgd-{name}-{parts}": with_sgd(recipe, parts, peers, own)
        for name, recipe in (("plain", PLAIN), ("distilling", RECIPE))
        for parts in (1, 2)
    }
    others = {
        "unreached": with_adam(peers, own),
        "left": left(peers, own),
        "ran_out": ran_out(peers, own),
        "not_finite": not_finite(peers, own),
        "shared": peers.shared({"from": rank}),
        "gathered": peers.gathered(rank),
        "any": peers.any(rank == 0, rank == 1, False),
    }
    torch.save(found | others, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("peers")
    mp.spawn(take_part, args=(str(folder),), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("name", "recipe"), [("plain", PLAIN), ("distilling", RECIPE)])
def test_two_processes_take_the_steps_of_one(
    name: str, recipe: Recipe, parts: int, found: list[dict[str, Any]]
) -> None:
    alone = with_sgd(recipe, 1, None, taught())
    first, second = (one[f"sgd-{name}-{parts}"] for one in found)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for ours, theirs, expected in zip(
        first["weights"], second["weights"], alone["weights"], strict=True
    ):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    head, begun = alone["weights"][-2], list(build_tiny().parameters())[-2]  # [classes, D]
    assert (head - begun).abs().max() > 0.01


def test_weights_that_no_loss_depends_on_stay_as_they_are(found: list[dict[str, Any]]) -> None:
    assert torch.equal(with_adam(None, taught()), torch.ones(2, 2))  # no decay either
    for one in found:
        assert torch.equal(one["unreached"], torch.ones(2, 2))


def test_when_one_leaves_all_leave(found: list[dict[str, Any]]) -> None:
    assert [one["left"] for one in found] == [2, 2]


def test_when_one_runs_out_of_memory_all_say_so(found: list[dict[str, Any]]) -> None:
    expected = [f"{PeerOutOfMemoryError.__name__} after 1", "MemoryError after 1"]
    assert [one["ran_out"] for one in found] == expected


def test_a_loss_that_is_not_finite_stops_all(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["not_finite"] == "loss is nan within the first 4 steps of the epoch"


def test_what_they_tell_each_other(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["shared"] == {"from": 0}
        assert one["gathered"] == [0, 1]
        assert one["any"] == [True, True, False]
