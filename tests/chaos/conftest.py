from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import Faulty, environment
from tests.sweeps import write_sweep


@pytest.fixture(scope="session")
def faulty(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """Sweeps on the Ray of all tests, of which `whole` has run undisturbed."""
    import ray

    address = ray.get_runtime_context().gcs_address
    sweep = write_sweep(Path(tmp_path_factory.mktemp("chaos")))
    one = Faulty(sweep=sweep, environment=environment(RAY_ADDRESS=address))
    one.run("whole")
    one.counts("whole")
    return one
