"""`python -m search run`: check, connect to Ray, run the sweep, print its front."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from search.check import check
from search.records.files import read_front
from search.records.front_diff import change
from search.report.progress import front_table, headline
from search.sweep.shipped import ROOT
from search.sweep.spec import Sweep
from search.tracking.addresses import page_address, ui_command

PACKAGES = ("search", "pruners")
"""Packages that Ray's workers import."""

WORSE = 3
"""Exit status of a sweep whose front is smaller than the one it started from."""


def run(sweep: Sweep, stream: TextIO) -> int:
    """Run a sweep, or show it if it is done, and say how to look at it.

    Returns:
        0, or `WORSE`.

    Raises:
        SweepError: If something of the sweep is wrong.
    """
    dense, space = check(sweep)
    sweep = sweep.in_shares(space.low, space.high)
    print(headline(sweep, space.dense_cost), file=stream, flush=True)
    connect()
    from search.tuner import earlier_front, is_done, run_sweep  # imports Ray Tune: seconds

    if is_done(sweep):
        print(f"{sweep.directory} holds this sweep, finished; its front:", file=stream)
        front = read_front(sweep.directory / "front.json")
    else:
        with sigterm_as_ctrl_c():
            front = run_sweep(sweep, dense, stream)
    print(file=stream)
    front_table(front, stream)
    print(f"\nEverything is in {sweep.directory}. Open it in MLflow:", file=stream)
    print(f"  {ui_command(sweep.tracking, sweep.directory)}", file=stream)
    print(f"and look at {page_address(sweep)}", file=stream)
    earlier = earlier_front(sweep)
    if earlier is None:
        return 0
    changed = change(earlier, front)
    print(f"\nAgainst {sweep.start_from}: {changed.describe()}", file=stream)
    return WORSE if changed.is_worse else 0


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    What workers print stays in Ray's logs: why a trial failed is reported by name, and the rest is
    what processes say that are told to end, which reads like an error and is none.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the first one ends the sweep
    settings: dict[str, Any] = {"log_to_driver": False}
    if _hidden_by(Path.cwd()):
        settings["runtime_env"] = {"worker_process_setup_hook": _import_packages}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, **settings)
    else:
        ray.init("local", include_dashboard=False, logging_level=logging.ERROR, **settings)


def _hidden_by(folder: Path) -> bool:
    """Whether a folder, which Ray puts first on its workers' path, has others of our names."""
    for name in PACKAGES:
        found = [path for path in (folder / name, folder / f"{name}.py") if path.exists()]
        if any(path.resolve() != ROOT / name for path in found):
            return True
    return False


def _import_packages() -> None:
    """Import our packages in a worker, before Ray puts the driver's folder first on its path.

    To find this function, the worker has imported `search` by now.
    """
    import pruners  # noqa: F401


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which jobs are stopped, do what Ctrl-C does; once Ray is connected."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
