"""Sweeps on three logical nodes of one machine, with GPUs that exist for Ray alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from search.records.files import read_trials
from tests.chaos.faults import Faulty, environment
from tests.forks.client import ray_workers
from tests.processes import ROOT
from tests.sweeps import write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETS = ("trials=4", "epochs=1", "halving=false", "sampler='random'", "refine=0.0")
SETS += ("concurrency=2", "data.batch_size=15", "finetune.precision='float32'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four GPUs on three nodes; only the head has more CPUs than GPUs."""
    forks = ray_workers()
    head = {"num_cpus": 6, "num_gpus": 1, **forks}
    one = Cluster(initialize_head=True, head_node_args=head)
    one.add_node(num_cpus=2, num_gpus=2, **forks)
    one.add_node(num_cpus=1, num_gpus=1, **forks)
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """Sweeps on that cluster, which keep decoded images in a folder for each node."""
    sweep = write_sweep(Path(tmp_path_factory.mktemp("nodes")))
    lines = sweep.read_text().splitlines(keepends=True)
    sweep.write_text("".join(line for line in lines if not line.startswith("cache_dir")))
    return Faulty(
        sweep=sweep,
        environment=environment(PYTHONPATH=str(ROOT), RAY_ADDRESS=cluster.address),
        driver=("tests.chaos.driver", "watched"),
    )


Notes = list[dict[str, Any]]


def run(nodes: Faulty, name: str, *sets: str, **more: str) -> Notes:
    """Run a sweep and return what its processes have noted."""
    folder = nodes.sweep.parent / f"notes-{name}"
    folder.mkdir()
    variables = nodes.environment | {"GPU_NOTES": str(folder)} | more
    dataclasses.replace(nodes, environment=variables).run(name, *SETS, *sets)
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda note: note["time"])


def of(notes: Notes, what: str) -> Notes:
    return [note for note in notes if note["what"] == what]


def trainers(notes: Notes) -> dict[int, tuple[str, str]]:
    """Process -> node and GPUs, of those that train trials.

    Ray Tune may start an actor more, for a trial that one which has become free takes meanwhile.
    """
    found = {n["process"]: (n["node"], n["gpus"]) for n in of(notes, "device") if n["is_actor"]}
    trained = {n["process"] for n in of(notes, "trial")}
    assert trained <= found.keys()
    return {process: found[process] for process in found if process in trained}


def losses(nodes: Faulty, name: str) -> dict[str, list[float]]:
    """What the epochs of each trial came to."""
    records = read_trials(nodes.directory(name) / "trials.parquet")
    assert {r.status for r in records} == {"dense", "finished"}
    return {r.trial: [h[k] for h in r.history for k in ("train_loss", "val_loss")] for r in records}


@pytest.fixture(scope="module")
def alone(nodes: Faulty) -> Notes:
    """A sweep whose trials take half a GPU each, on the one node that has the CPUs for them."""
    return run(nodes, "alone", "resources={cpu=3, gpu=0.5}", MEET="1")


@pytest.fixture(scope="module")
def together(nodes: Faulty) -> Notes:
    """The same sweep, with two processes for each trial."""
    return run(nodes, "together", "resources={cpu=1, gpu=1, workers=2}")


def test_two_trials_at_once_share_a_gpu(alone: Notes) -> None:
    ((_, gpus),) = set(trainers(alone).values())
    assert gpus == "0"
    first, second, *_ = [
        [n["time"] for n in alone if n["process"] == process] for process in trainers(alone)
    ]
    assert max(min(first), min(second)) < min(max(first), max(second))


def test_trials_of_two_processes_come_to_what_those_of_one_come_to(
    nodes: Faulty, alone: Notes, together: Notes
) -> None:
    ours, theirs = losses(nodes, "together"), losses(nodes, "alone")
    assert len(ours) == 4
    for trial, values in theirs.items():
        assert ours[trial] == pytest.approx(values, rel=1e-3), trial
    assert ours != theirs  # summed in another order


def test_each_process_sees_one_gpu_which_is_its_own(together: Notes) -> None:
    found = trainers(together)
    assert len(found) == 4  # of two trials at once
    assert {gpus for _, gpus in found.values()} == {"0", "1"}
    assert len(set(found.values())) == 4
    assert len({node for node, _ in found.values()}) == 3


def test_images_are_decoded_once_per_node(together: Notes) -> None:
    decoded = Counter((n["node"], n["file"]) for n in of(together, "decode"))
    assert set(decoded.values()) == {1}
    splits = Counter(node for node, _ in decoded)
    training = {node for node, _ in trainers(together).values()}
    assert all(splits[node] >= 2 for node in training)  # train and val
    assert max(splits.values()) <= 3


def test_scores_come_from_the_storage_not_from_the_driver(nodes: Faulty, together: Notes) -> None:
    trials, found = of(together, "trial"), trainers(together)
    assert max(n["bytes"] for n in trials) < 4096  # what the driver hands out
    given = {n["learned"] for n in trials if n["learned"]}
    assert {Path(path).parent for path in given} == {nodes.sweep.parent / "results" / "learned"}
    read = [n for n in of(together, "scores") if n["process"] in found]
    assert {n["path"] for n in read} == given
    assert len({n["process"] for n in read}) <= 2  # the first of each group; others get the model
