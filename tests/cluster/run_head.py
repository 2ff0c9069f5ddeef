"""A head node with these parameters, until SIGTERM: `python -m tests.cluster.run_head JSON`."""

from __future__ import annotations

import json
import signal
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        signal.pause()
    finally:
        cluster.shutdown()
