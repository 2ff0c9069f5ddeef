"""What tests that start processes need."""

from __future__ import annotations

import multiprocessing
import socket
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_forks() -> BaseContext:
    """Processes that start fast and hold no lock of a thread that they lack.

    A fork of this process, where torch, Arrow and Ray have threads, now and then hangs; these are
    forked from a process that has none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.data.teacher", "search.records.lease"])
    return context
