"""A head node with these parameters, until SIGTERM: `python -m tests.cluster.run_head JSON`."""

from __future__ import annotations

import json
import signal
import sys

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=given)
    write_ray_address(cluster.address, given["temp_dir"])  # where its jobs look for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        signal.pause()
    finally:
        cluster.shutdown()
