"""A Python that has imported what sweeps import, and forks for each process that asks it to.

To import torch, timm and MLflow takes five seconds of a core; a sweep starts four processes that
do, and tests start sweeps by the dozen. A copy of this process begins with all of that, and is then
what it was asked to be: a process of its own, with its own number, signals and exit status, that
runs a module or a file as `__main__`.

`python -m tests.forks.server SOCKET`. A request is a line of JSON and three files: standard input,
output and error. The answers are the process's number and, when it has ended, its exit status. Who
hangs up before that has the process killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

IMPORTS = (
    *("torch._dynamo", "torch.export", "timm", "onnxscript", "pandas", "pyarrow.parquet"),
    *("mlflow.onnx", "mlflow.store.tracking.sqlalchemy_store", "optuna", "matplotlib.pyplot"),
    *("aiohttp", "jsonschema", "rich.console", "yaml"),
)
"""Not Ray, which takes settings from the environment when it is imported, nor onnxruntime, which
starts a thread that copies would lack, nor what is tested here."""

PACKAGES = sys.path[1:]
"""Where this Python finds what is installed; it is started without a PYTHONPATH."""


@dataclass
class Process:
    """A copy that runs, and who asked for it."""

    pid: int
    asker: socket.socket


class Server:
    """Forks on request, until its standard input is closed."""

    def __init__(self, path: str) -> None:
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(path)
        self.door.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.door, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        self.by_end: dict[int, Process] = {}  # what becomes readable when it ends

    def request(self) -> dict[str, Any]:
        """Serve; return, in each copy, what it was asked to be."""
        while True:
            for key, _ in self.selector.select():
                if self.selector.get_map().get(key.fd) is not key:
                    continue  # no longer, since the one before it
                if key.fileobj is self.door:
                    asked = self._fork(self.door.accept()[0])
                    if asked is not None:
                        return asked
                elif key.fileobj is sys.stdin:
                    self._end()
                elif key.fileobj in self.by_end:
                    self._ended(key.fd)
                else:  # who asked has hung up
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self, asker: socket.socket) -> dict[str, Any] | None:
        line, files, _, _ = socket.recv_fds(asker, 1 << 20, 3)
        while not line.endswith(b"\n"):
            more = asker.recv(1 << 20)
            if not more:
                asker.close()
                return None
            line += more
        pid = os.fork()
        if pid == 0:
            self._close()
            asker.close()
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            asked: dict[str, Any] = json.loads(line)
            return asked
        for file in files:
            os.close(file)
        end = os.pidfd_open(pid)
        self.by_end[end] = Process(pid, asker)
        self.selector.register(end, selectors.EVENT_READ)
        self.selector.register(asker, selectors.EVENT_READ, pid)
        asker.sendall(f"{pid}\n".encode())
        return None

    def _ended(self, end: int) -> None:
        process = self.by_end.pop(end)
        _, status = os.waitpid(process.pid, 0)
        self.selector.unregister(end)
        os.close(end)
        if process.asker.fileno() in self.selector.get_map():
            self.selector.unregister(process.asker)
            process.asker.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        process.asker.close()

    def _end(self) -> None:
        for process in self.by_end.values():
            os.kill(process.pid, signal.SIGKILL)
        sys.exit()

    def _close(self) -> None:
        """In a copy: leave the others' files alone."""
        self.selector.close()
        self.door.close()
        for end, process in self.by_end.items():
            os.close(end)
            process.asker.close()


def become(asked: dict[str, Any]) -> None:
    """Run what was asked for, as Python would have from the start."""
    if asked["session"]:
        os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    first, *arguments = asked["arguments"]
    here = os.getcwd() if first == "-m" else os.path.dirname(first)
    sys.path[:] = [here, *_python_path(), *PACKAGES]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    if first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name="__main__")


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


if __name__ == "__main__":
    server = Server(sys.argv[1])
    for module in IMPORTS:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # pages that the copies share
    print("ready", flush=True)
    become(server.request())
