"""What happens to nodes: one dies, one is preempted, others join. Logical GPUs on one machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.chaos.faults import Faulty, on_logical_gpus, until
from tests.forks.client import ray_workers

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

SETS = ("resources={cpu=1, gpu=1}", "concurrency=2", "halving=false", "sampler='random'")
SETS += ("refine=0.0",)  # plans that do not depend on which trial ends first

NODE = {"num_cpus": 1, "num_gpus": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without a GPU."""
    head = {"num_cpus": 1, "num_gpus": 0, **ray_workers()}
    one = Cluster(initialize_head=True, head_node_args=head)
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def here(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """Sweeps on that cluster, of which `calm` has run undisturbed."""
    one = on_logical_gpus(cluster.address, Path(tmp_path_factory.mktemp("nodes")))
    nodes = [cluster.add_node(**NODE, **ray_workers()) for _ in range(2)]
    one.run("calm", *SETS)
    one.counts("calm")
    for node in nodes:
        cluster.remove_node(node)
    return one


def test_trials_of_a_node_that_dies_move(cluster: Cluster, here: Faulty) -> None:
    first, second = (cluster.add_node(**NODE, **ray_workers()) for _ in range(2))
    driver = here.start("died", *SETS)
    until(lambda: here.lines("died") >= 8, 200)
    cluster.remove_node(first, allow_graceful=False)
    third = cluster.add_node(**NODE, **ray_workers())
    here.finish(driver)
    here.same("died", "calm")
    for node in (second, third):
        cluster.remove_node(node)


def test_trials_of_a_preempted_node_are_saved_and_move(cluster: Cluster, here: Faulty) -> None:
    """A spot node gets SIGTERM and is gone within 30 s."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
    command += [f"--address={cluster.address}", "--num-gpus=1", "--disable-usage-stats"]
    spot = subprocess.Popen(
        command,
        env=here.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    sets = [*SETS, "concurrency=1", "epochs=2"]
    driver = here.start("spot", *sets)
    until(lambda: here.lines("spot") >= 7, 200)
    spot.send_signal(signal.SIGTERM)
    spot.wait(30)
    node = cluster.add_node(**NODE, **ray_workers())
    said = here.finish(driver)
    assert "told to end" in said
    here.same("spot", "calm")
    cluster.remove_node(node)
