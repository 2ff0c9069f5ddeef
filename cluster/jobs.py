"""Sweeps as Ray jobs: submitted, found by their names, followed, stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import shlex
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connection import Address, ClusterError
from cluster.upload import SWEEP, refuse_what_stays_behind, stage
from search.sweep import PASSWORD, ROOT, SweepError, load_sweep

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""Names of environment variables that are secrets: a job's runtime environment is shown to all who
see the dashboard.
"""

EXTRA = "search"
"""What nodes need beside the packages that all need: the extra of pyproject.toml."""

LIVE = ("PENDING", "RUNNING")
"""States of a job that has not ended, as Ray names them."""

POLL_S = 1.0

START_S = 60
"""How long, in seconds, a cluster may take from its dashboard's start until it takes jobs."""


class JobExistsError(RuntimeError):
    """The id of a job that the cluster has seen before."""


class Jobs:
    """The jobs of a cluster."""

    def __init__(
        self,
        address: Address,
        *,
        install: bool = True,
        variables: Sequence[str] = (),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Connect.

        Args:
            address: Where.
            install: Whether nodes install the packages that pyproject.toml names, as far as they
                lack them; else they have them.
            variables: Environment variables that jobs get from here; no secrets.
            environment: Where these are.

        Raises:
            ClusterError: If the cluster does not answer.
            SweepError: If a variable is not set, or is a secret.
        """
        self.address, self.client = address, address.connect()
        self.runtime: dict[str, Any] = {"env_vars": _values(variables, environment)}
        if install:
            self.runtime["pip"] = {"packages": dependencies(), "pip_check": False}

    def submit(self, path: Path, overrides: Sequence[str], *, job: str | None = None) -> str:
        """Check a sweep and submit it.

        Args:
            path: TOML file of the sweep.
            overrides: `KEY=VALUE`, later ones win.
            job: Id of the job, which a cluster takes only once; None is the sweep's name and the
                time.

        Returns:
            The job's id.

        Raises:
            SweepError: If something of the sweep is wrong, or if it runs already.
            JobExistsError: If the cluster has seen the id before.
            ClusterError: If the cluster does not answer.
        """
        sweep = load_sweep(path, overrides)
        refuse_what_stays_behind(sweep)
        for other in self.of(sweep.name):
            if other.status in LIVE and other.submission_id != job:
                raise SweepError(
                    f"sweep {sweep.name} runs already, as job {other.submission_id}; wait for it, "
                    f"or stop it: python -m cluster stop {sweep.name}"
                )
        job = job or f"{sweep.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        command = ["python", "-m", "search", "run", SWEEP]
        command += ["--set", *overrides] if overrides else []
        with tempfile.TemporaryDirectory(prefix="prunefront-") as folder, _answers(self.address):
            stage(path, sweep, Path(folder))
            self._submit(
                entrypoint=shlex.join(command),
                submission_id=job,
                runtime_env={"working_dir": folder, **self.runtime},
                metadata={"sweep": sweep.name},
            )
        return job

    def _submit(self, **job: Any) -> None:
        """Submit a job, if need be as soon as a cluster that has just been started takes any."""
        for left in reversed(range(START_S)):
            try:
                self.client.submit_job(**job)
            except RuntimeError as error:
                if "already exists" in str(error):
                    name = job["submission_id"]
                    raise JobExistsError(f"the cluster has seen job {name} before") from error
                if "No available agent" not in str(error) or not left:
                    raise
                time.sleep(POLL_S)
            else:
                return

    def of(self, sweep: str | None = None) -> list[JobDetails]:
        """Return the jobs of a sweep, or of all sweeps, the latest first."""
        with _answers(self.address):
            found = [
                job
                for job in self.client.list_jobs()
                if job.submission_id and _sweep_of(job) and sweep in (None, _sweep_of(job))
            ]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def latest(self, sweep: str) -> JobDetails:
        """Return the last job of a sweep.

        Raises:
            SweepError: If there is none.
        """
        if found := self.of(sweep):
            return found[0]
        names = sorted({_sweep_of(job) for job in self.of()})
        known = f"there are {', '.join(names)}" if names else "there is none"
        raise SweepError(f"the cluster knows no sweep {sweep!r}; {known}")

    def state(self, job: str) -> str | None:
        """Return "running" (or about to), "ended", or None if the cluster does not know the job."""
        found = next((one for one in self.of() if one.submission_id == job), None)
        if found is None:
            return None
        return "running" if found.status in LIVE else "ended"

    def logs(self, job: str) -> str:
        """Return what a job has printed so far."""
        with _answers(self.address):
            return str(self.client.get_job_logs(job))

    def follow(self, job: str, say: Callable[[str], None]) -> int:
        """Pass on what a job prints until it ends, and return its exit code."""
        with _answers(self.address):
            asyncio.run(_follow(self.client.tail_job_logs(job), say))
            while (details := self.client.get_job_info(job)).status in LIVE:
                time.sleep(POLL_S)  # the log ends a moment before the job
        if details.status == "SUCCEEDED":
            return 0
        return details.driver_exit_code or 1

    def stop(self, job: str) -> None:
        """Stop a job and wait until it has stopped; what was finished stays, and it can go on."""
        with _answers(self.address):
            self.client.stop_job(job)
            while self.client.get_job_status(job) in LIVE:
                time.sleep(POLL_S)


def dependencies(root: Path = ROOT) -> list[str]:
    """Return the packages that a sweep needs, as pyproject.toml or what is installed names them.

    Raises:
        SweepError: If there is neither in the folder that holds the packages.
    """
    path = root / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text())["project"]
        return [*project["dependencies"], *project["optional-dependencies"][EXTRA]]
    try:
        installed = importlib.metadata.distribution("prunefront")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or Path(str(installed.locate_file(""))).resolve() != root:
        raise SweepError(f"{path} does not exist; run this from a checkout, or give --no-install")
    parts = [line.partition(";") for line in installed.requires or ()]
    wanted = ("", f'extra=="{EXTRA}"')
    return [name.strip() for name, _, when in parts if when.replace(" ", "") in wanted]


async def _follow(lines: Any, say: Callable[[str], None]) -> None:
    async for text in lines:
        say(text)


def _sweep_of(job: JobDetails) -> str:
    return str((job.metadata or {}).get("sweep", ""))


def _values(variables: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    for name in variables:
        if name not in environment:
            raise SweepError(f"--env {name} is not set here; export it first")
        if SECRET.search(name) or PASSWORD.search(environment[name]):
            raise SweepError(
                f"--env {name} looks like a secret, and all who see the dashboard would see it; "
                "set it where Ray is started on the nodes"
            )
    return {name: environment[name] for name in variables}


@contextmanager
def _answers(address: Address) -> Iterator[None]:
    """Say in one line that a cluster has stopped answering, or does not do what it is asked."""
    try:
        yield
    except (SweepError, JobExistsError, ClusterError):
        raise
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"{address.url}: {' '.join(str(error).split())}") from error
