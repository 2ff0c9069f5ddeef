"""What happens to trials of several processes: one of them is killed, or its node is preempted."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.chaos.faults import Faulty, actors, on_logical_gpus, until
from tests.forks.client import ray_workers

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

SETS = ("resources={cpu=1, gpu=1, workers=2}", "trials=3", "concurrency=1", "halving=false")
SETS += ("sampler='random'", "refine=0.0", "data.batch_size=2")

NODE = {"num_cpus": 1, "num_gpus": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with a GPU, and a node for the second worker."""
    head = {"num_cpus": 1, "num_gpus": 1, **ray_workers()}
    one = Cluster(initialize_head=True, head_node_args=head)
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def here(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """Sweeps on that cluster, of which `calm` has run undisturbed."""
    one = on_logical_gpus(cluster.address, Path(tmp_path_factory.mktemp("groups")))
    node = cluster.add_node(**NODE, **ray_workers())
    one.run("calm", *SETS)
    cluster.remove_node(node)
    return one


def has_room(cluster: Cluster) -> bool:
    """Whether the cluster has two GPUs, so that a sweep of two workers is not refused."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "status", f"--address={cluster.address}"]
    return "/2.0 GPU" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_is_killed_fails_the_trial_which_goes_on_from_what_was_saved(
    which: int, cluster: Cluster, here: Faulty
) -> None:
    node, name = cluster.add_node(**NODE, **ray_workers()), f"killed-{which}"
    driver = here.start(name, *SETS)
    until(lambda: here.lines(name) >= 7, 200)
    workers = sorted(actors("ray::RayTrainWorker"), key=lambda process: process.pid)
    assert len(workers) == 2
    workers[which].send_signal(signal.SIGKILL)
    said = here.finish(driver)
    assert "goes on elsewhere: RuntimeError: worker " in said
    assert "by peer" not in said  # what the other worker finds is no reason
    here.same(name, "calm")
    cluster.remove_node(node)


def test_a_worker_whose_node_is_preempted_ends_the_group_which_is_saved_and_moves(
    cluster: Cluster, here: Faulty
) -> None:
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
    until(lambda: has_room(cluster), 60)
    driver = here.start("spot", *SETS)
    until(lambda: here.lines("spot") >= 7, 200)
    spot.send_signal(signal.SIGTERM)
    spot.wait(40)
    node = cluster.add_node(**NODE, **ray_workers())
    said = here.finish(driver)
    assert "told to end" in said
    here.same("spot", "calm")
    cluster.remove_node(node)
