"""What a node of Ray starts in place of its own worker: asks for a copy that is one, and waits.

Ray ends a worker by its number, which the copy tells it, or this process, with which it ends too.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.forks.client import SOCKET, answer, ask

if __name__ == "__main__":
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    worker = str(Path(ray.origin).parent / "_private" / "workers" / "default_worker.py")
    asker = ask(
        os.environ[SOCKET],
        [worker, *sys.argv[1:]],
        (0, 1, 2),
        env=dict(os.environ),
        cwd=os.getcwd(),
        session=False,
    )
    pid = answer(asker)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    sys.exit(answer(asker))
