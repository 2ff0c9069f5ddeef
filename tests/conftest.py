from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pruners import PrunableViT
from tests.forks.client import ray_workers
from tests.models import build_tiny
from tests.sweeps import write_sweep

# Servers of MLflow would start seven more processes for jobs that nothing here asks for.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of drivers: two processes of tests share the cores

DEAR = {"ray_session", "cluster", "demo", "made"}
"""Fixtures that start Ray, or export a model: whoever uses them is slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files with slow tests begin first, so that two processes end together."""
    for item in items:
        if DEAR & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., PrunableViT]:
    """Builds a tiny model."""
    return build_tiny


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(6, 3, 24, 16, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(3)
    ]


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """A whole small sweep."""
    return write_sweep(tmp_path)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests; its workers are forked."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, **ray_workers()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()
