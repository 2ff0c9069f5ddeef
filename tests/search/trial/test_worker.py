"""Two processes run a trial together, without Ray; all that they do is done in one pair of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pruners.training.fine_tune import FineTuner
from pruners.training.peers import Peers
from search.records.events import EpochResult, TrialConfig
from search.records.ledger import Ledger
from search.strategy.searcher import PlanSearcher
from search.sweep.toml import load_sweep
from search.trial.inputs import TrialInputs
from search.trial.memory import is_out_of_memory
from search.trial.preemption import ToldToEndError
from search.trial.trial import Trial
from search.trial.worker import FirstWorker, follow
from search.trial.workers import OneWorker
from tests.sweeps import write_sweep

pytestmark = pytest.mark.slow

SETS = ["epochs=2", "seed=5", "finetune.precision='float32'", "data.batch_size=15"]
SETS += ["resources={workers=2}"]
KEYS = ("epoch", "status", "val_loss", "train_loss")


def inputs_of(folder: Path, *sets: str) -> tuple[TrialInputs, TrialConfig]:
    """What a sweep's trials share, and the first that is cut."""
    from search.check import check

    sweep = load_sweep(folder / "tiny.toml", [*SETS, *sets])
    dense, space = check(sweep)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    searcher = PlanSearcher(sweep, space, Ledger(sweep))
    configs = [TrialConfig.from_json(searcher.suggest(f"t{i}")) for i in range(2)]
    inputs = TrialInputs(sweep=sweep, dense=dense, start=dense, directory=sweep.directory)
    return inputs, configs[1]


def run(one: Trial) -> dict[str, Any]:
    results: list[EpochResult] = []
    try:
        while not (results and results[-1].done):
            results.append(one.step())
    except ToldToEndError:
        return {"told": [path.name for path in one.files.directory.iterdir()]}
    weights = [p.detach().clone() for p in one.vit.parameters()]
    return {"results": [[getattr(r, key) for key in KEYS] for r in results], "weights": weights}


def shared_run(inputs: TrialInputs, config: TrialConfig, peers: Peers) -> dict[str, Any]:
    """Run a trial in two new processes, as far as what they hold goes."""
    if peers.rank > 0:
        follow(inputs, peers)
        return {}
    workers = FirstWorker(peers)
    found = run(Trial.first(inputs, config, workers))
    workers.end()
    return found


def take_part(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    peers = Peers(is_out_of_memory)
    plain, config = inputs_of(folder / str(rank))
    random, _ = inputs_of(folder / str(rank), "model.args={drop_path_rate=0.5}", 'name="random"')

    def of(inputs: TrialInputs, name: str) -> TrialInputs:
        return dataclasses.replace(inputs, directory=folder / name)

    found = {"plain": shared_run(of(plain, "plain"), config, peers)}
    found["random"] = shared_run(of(random, "random"), config, peers)

    given = Peers.any

    def told(one: Peers, *flags: bool) -> list[bool]:
        """The second process is told to end after three steps of the second epoch."""
        told.steps += len(flags) == 1  # type: ignore[attr-defined]
        return given(one, *flags[:-1], flags[-1] or (rank == 1 and told.steps == 8))  # type: ignore[attr-defined]

    told.steps = 0  # type: ignore[attr-defined]
    Peers.any = told  # type: ignore[method-assign]
    found["told"] = shared_run(of(random, "left"), config, peers)
    Peers.any = given  # type: ignore[method-assign]
    found["resumed"] = shared_run(of(random, "left"), config, peers)

    backward = FineTuner._backward

    def limited(tuner: FineTuner, *batch: Any) -> torch.Tensor:
        if rank == 1 and tuner.parts < 4 and tuner.schedule.last_epoch >= 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(tuner, *batch)

    FineTuner._backward = limited  # type: ignore[method-assign]
    found["in parts"] = shared_run(of(plain, "parts"), config, peers)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first process has left what it found."""
    folder = Path(tmp_path_factory.mktemp("member"))
    for rank in range(3):
        (folder / str(rank)).mkdir()
        write_sweep(folder / str(rank))
    mp.spawn(take_part, args=(folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    return torch.load(folder / "0.pt")


def close(ours: dict[str, Any], theirs: dict[str, Any], rel: float) -> None:
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], rel=rel)


def test_two_processes_come_to_what_one_comes_to(folder: Path, found) -> None:
    inputs, config = inputs_of(folder / "2")
    alone = dataclasses.replace(inputs, directory=folder / "alone")
    close(found["plain"], run(Trial.first(alone, config, OneWorker())), rel=1e-4)
    assert found["plain"]["results"] != found["random"]["results"]


def test_what_one_process_is_told_ends_both_and_nothing_is_lost(found) -> None:
    assert found["told"] == {"told": ["epoch-0001-000003"]}
    assert found["resumed"]["results"] == found["random"]["results"]
    for ours, theirs in zip(found["resumed"]["weights"], found["random"]["weights"], strict=True):
        assert torch.equal(ours, theirs)


def test_memory_that_one_process_lacks_lets_both_take_smaller_parts(found) -> None:
    close(found["in parts"], found["plain"], rel=1e-3)
