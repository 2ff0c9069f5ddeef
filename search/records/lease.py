"""A lease on a sweep's directory: one driver at a time, wherever the others run.

A retried job may start a second driver, on another cluster even, while the first still runs. Each
attempt is a file, numbered; only one process can make the next number, and whoever has the highest
may write. Its holder changes it every few seconds. Nobody compares the clocks of two machines: who
wants to follow watches whether the file still changes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pruners.model.files import replace_file, temporary_name
from search.records.atomic import writing_to
from search.records.typed import JsonObject
from search.sweep.spec import SweepError, SweepFailedError

LEASE = "lease"
"""Folder of a sweep's directory that holds the attempts."""

BEAT_S = 5.0
"""How often a holder changes its file."""

TRUST_S = 15.0
"""For how long it may write without having done so; it looks again afterwards."""

WATCH_S = 30.0
"""For how long a file that does not change is watched before its holder counts as dead."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Who runs a sweep, or did.

    Attributes:
        number: 1, 2, ...
        driver: Its Ray job, or "by hand".
        host: Name of its machine.
        process: What tells its process from all others: machine, number, start.
        beat: How often the holder has said that it lives.
        released: Whether it has said that it is done.
    """

    number: int
    driver: str
    host: str
    process: tuple[str, int, int]
    beat: int = 0
    released: bool = False

    def describe(self) -> str:
        """Name it in a few words."""
        return f"attempt {self.number} ({self.driver}, {self.host}, process {self.process[1]})"


class Lease:
    """The right to write a sweep's directory, for as long as nobody else has taken it."""

    def __init__(self, folder: Path, attempt: Attempt) -> None:
        """Use `hold` instead."""
        self.folder, self.attempt = folder, attempt
        self._renewed = _now()
        self._lock, self._end = threading.Lock(), threading.Event()

    def check(self) -> None:
        """Check that the lease is held still; cheap unless its thread has stood still.

        Raises:
            SweepFailedError: If it is not, or if that cannot be known.
        """
        if _now() - self._renewed > TRUST_S:
            self.renew()

    def renew(self) -> None:
        """Say that the holder lives.

        Raises:
            SweepFailedError: If another attempt has begun, or the file cannot be written.
        """
        with self._lock, writing_to(self.folder):
            started = _now()
            check_attempt(self.folder.parent, self.attempt.number)
            self.attempt = replace(self.attempt, beat=self.attempt.beat + 1)
            _replace(self.folder, self.attempt)
            self._renewed = started

    def release(self) -> None:
        """Say that the holder is done, unless another has taken over."""
        self._end.set()
        with self._lock, writing_to(self.folder):
            if newest(self.folder) == self.attempt:
                _replace(self.folder, replace(self.attempt, released=True))

    def keep(self) -> None:
        """Renew until the end; meant for a thread."""
        while not self._end.wait(BEAT_S):
            try:
                self.renew()
            except SweepFailedError:  # whoever writes next finds the same, in `check`
                continue


@contextmanager
def hold(directory: Path, say: Callable[[str], None]) -> Iterator[Lease]:
    """Take the lease of a sweep's directory, which exists, and hold it.

    Args:
        directory: The sweep's.
        say: Told in a line that another driver is being watched.

    Raises:
        SweepError: If another driver holds it.
    """
    folder = directory / LEASE
    with writing_to(directory):
        folder.mkdir(exist_ok=True)
        lease = Lease(folder, _take(folder, say))
    threading.Thread(target=lease.keep, name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def check_attempt(directory: Path, number: int) -> None:
    """Check that no later attempt at a sweep has begun.

    Raises:
        SweepFailedError: If one has.
    """
    last = newest(directory / LEASE)
    if last is not None and last.number > number:
        raise SweepFailedError(
            f"{last.describe()} has taken over {directory}; attempt {number} writes no more"
        )


def newest(folder: Path) -> Attempt | None:
    """Return the last attempt; None if there is none."""
    found = sorted(path.name for path in folder.glob("*.json") if _NAME.fullmatch(path.name))
    return _read(folder / found[-1]) if found else None


def _take(folder: Path, say: Callable[[str], None]) -> Attempt:
    while True:
        last = newest(folder)
        if last is not None and not _is_over(folder, last, say):
            raise SweepError(
                f"{folder.parent} is written by {last.describe()}; "
                "wait until it has ended, or stop it first"
            )
        mine = Attempt(
            number=1 if last is None else last.number + 1,
            driver=_job() or "by hand",
            host=socket.gethostname(),
            process=_process(os.getpid()),
        )
        if _create(folder, mine):
            return mine


def _is_over(folder: Path, last: Attempt, say: Callable[[str], None]) -> bool:
    """Whether the holder of an attempt has ended: it says so, is gone, or stands still."""
    if last.released:
        return True
    machine, number, _ = last.process
    if machine and machine == _machine():
        return _process(number) != last.process
    say(f"{last.describe()} may still run this sweep: watching it for {WATCH_S:.0f} s")
    start = time.monotonic()
    while time.monotonic() - start < WATCH_S:
        time.sleep(min(1.0, WATCH_S / 10))
        if newest(folder) != last:
            return False
    return True


def _create(folder: Path, attempt: Attempt) -> bool:
    """Write a new attempt; False if somebody has made that number."""
    path = _path(folder, attempt.number)
    temporary = temporary_name(path)
    try:
        temporary.write_text(json.dumps(asdict(attempt)))
        os.link(temporary, path)  # atomic, and fails if it is there
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _replace(folder: Path, attempt: Attempt) -> None:
    content = json.dumps(asdict(attempt))
    replace_file(_path(folder, attempt.number), lambda temporary: temporary.write_text(content))


def _read(path: Path) -> Attempt:
    try:
        values: JsonObject = json.loads(path.read_text())
        machine, number, start = values.pop("process")
        return Attempt(**values, process=(machine, number, start))
    except (ValueError, TypeError, KeyError) as error:
        raise SweepError(f"{path} is damaged; remove it if no driver runs this sweep") from error


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


_NAME = re.compile(r"[0-9]{6}\.json")
_JOB_ID = "job_submission_id"


def _process(number: int) -> tuple[str, int, int]:
    """Return what tells a process from all others: its machine, number and start (0: none)."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return _machine(), number, 0
    values = stat.rpartition(")")[2].split()
    ended = values[0] in "ZX"  # not yet waited for
    return _machine(), number, 0 if ended else int(values[19])


def _job() -> str:
    """Return the id of the Ray job that this process is the driver of; empty if of none."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"][_JOB_ID])
    except (KeyError, ValueError, TypeError):
        return ""


def _machine() -> str:
    """Return what tells this machine, and the container on it, from others; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
