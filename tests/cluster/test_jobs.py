from __future__ import annotations

import dataclasses
import os
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.connection import Address, ClusterError
from cluster.jobs import JobExistsError, Jobs, dependencies
from search.sweep.spec import SweepError


class Client:
    """What Ray's client does, without a cluster."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.sent: list[set[str]] = []
        self.jobs: list[SimpleNamespace] = []
        self.fails: Exception | None = None

    def submit_job(self, **job: Any) -> str:
        if self.fails is not None:
            raise self.fails
        self.submitted.append(job)
        self.sent.append(set(os.listdir(job["runtime_env"]["working_dir"])))
        self.add(job["submission_id"], job["metadata"]["sweep"], "RUNNING", time.time())
        return str(job["submission_id"])

    def add(self, job: str | None, sweep: str | None, status: str, start: float) -> None:
        metadata = None if sweep is None else {"sweep": sweep}
        values = {"submission_id": job, "metadata": metadata, "status": status}
        self.jobs.append(SimpleNamespace(**values, start_time=int(1000 * start)))

    def list_jobs(self) -> list[SimpleNamespace]:
        if self.fails is not None:
            raise self.fails
        return self.jobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Here(Address):
    client: Client = dataclasses.field(default_factory=Client)

    def connect(self) -> Any:
        return self.client


@pytest.fixture
def client() -> Client:
    return Client()


def jobs_of(client: Client, **options: Any) -> Jobs:
    return Jobs(Here(url="http://127.0.0.1:8265", token=None, client=client), **options)


def test_a_sweep_becomes_a_job(client: Client, sweep_file: Path) -> None:
    jobs = jobs_of(client, variables=["REGION"], environment={"REGION": "eu", "OTHER": "x"})
    job = jobs.submit(sweep_file, ["trials=3"])
    (submitted,) = client.submitted
    assert submitted["submission_id"] == job
    assert job.startswith("tiny-2")
    assert submitted["metadata"] == {"sweep": "tiny"}
    assert submitted["entrypoint"] == "python -m search run sweep.toml --set trials=3"
    runtime = submitted["runtime_env"]
    assert runtime["env_vars"] == {"REGION": "eu"}
    assert runtime["pip"]["packages"] == dependencies()
    assert client.sent == [{"search", "pruners", "sweep.toml"}]
    assert not Path(runtime["working_dir"]).exists()  # what was sent is not left behind


def test_values_reach_the_job_as_they_are(client: Client, sweep_file: Path) -> None:
    override = """steps=[{method="tome"}, {method='magnitude', scope="layer"}]"""
    jobs_of(client, install=False).submit(sweep_file, [override, 'name="a-b"'], job="a-b-1")
    (submitted,) = client.submitted
    assert shlex.split(submitted["entrypoint"])[-2:] == [override, 'name="a-b"']
    assert submitted["submission_id"] == "a-b-1"
    assert submitted["metadata"] == {"sweep": "a-b"}
    assert "pip" not in submitted["runtime_env"]


def test_what_is_wrong_with_a_sweep_is_said_here(client: Client, sweep_file: Path) -> None:
    jobs = jobs_of(client)
    with pytest.raises(SweepError, match=r"did you mean 'trials'\?"):
        jobs.submit(sweep_file, ["trails=3"])
    with pytest.raises(SweepError, match="storage is 'results'"):
        jobs.submit(sweep_file, ['storage="results"'])
    assert client.submitted == []


def test_a_sweep_that_runs_is_not_submitted_again(client: Client, sweep_file: Path) -> None:
    jobs = jobs_of(client)
    client.add("tiny-1", "tiny", "FAILED", 1.0)
    client.add("other-1", "other", "RUNNING", 2.0)
    job = jobs.submit(sweep_file, [])
    with pytest.raises(SweepError, match=f"sweep tiny runs already, as job {job}; .* stop tiny"):
        jobs.submit(sweep_file, [])
    jobs.submit(sweep_file, ['name="else"'])


def test_an_id_is_taken_once(client: Client, sweep_file: Path) -> None:
    jobs = jobs_of(client)

    def seen(**_: object) -> str:
        raise RuntimeError("status code 500: Job with submission_id a already exists")

    client.submit_job = seen  # type: ignore[method-assign]
    with pytest.raises(JobExistsError, match="has seen job a before"):
        jobs.submit(sweep_file, [], job="a")


def test_a_cluster_that_has_just_been_started_is_waited_for(
    client: Client, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.jobs.POLL_S", 0.0)
    jobs, submit, tries = jobs_of(client), client.submit_job, []

    def starting(**job: Any) -> str:
        tries.append(job)
        if len(tries) < 4:
            raise RuntimeError("status code 500: No available agent to submit job, please try")
        return submit(**job)

    client.submit_job = starting  # type: ignore[method-assign]
    assert jobs.submit(sweep_file, []) == client.submitted[0]["submission_id"]
    assert len(tries) == 4
    monkeypatch.setattr("cluster.jobs.START_S", 2)
    tries.clear()
    with pytest.raises(ClusterError, match="No available agent"):
        jobs.submit(sweep_file, ['name="other"'])
    assert len(tries) == 2


def test_jobs_are_found_by_their_sweep_the_latest_first(client: Client) -> None:
    client.add("a-1", "a", "SUCCEEDED", 1.0)
    client.add("b-1", "b", "RUNNING", 2.0)
    client.add("a-2", "a", "PENDING", 3.0)
    client.add("c-1", None, "RUNNING", 4.0)  # somebody else's
    client.add(None, "a", "RUNNING", 5.0)  # no submitted job
    jobs = jobs_of(client)
    assert [job.submission_id for job in jobs.of()] == ["a-2", "b-1", "a-1"]
    assert jobs.latest("a").submission_id == "a-2"
    with pytest.raises(SweepError, match="knows no sweep 'z'; there are a, b"):
        jobs.latest("z")
    states = {job: jobs.state(job) for job in ("a-1", "a-2", "b-1", "c-1", "z")}
    assert states == {"a-1": "ended", "a-2": "running", "b-1": "running", "c-1": None, "z": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("MLFLOW_TRACKING_TOKEN", "x"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("db_credentials", "x"),
        ("DATABASE", "postgresql://me:hunter2@db/mlflow"),
    ],
)
def test_secrets_never_reach_a_jobs_description(name: str, value: str, client: Client) -> None:
    with pytest.raises(SweepError, match=f"--env {name} looks like a secret") as raised:
        jobs_of(client, variables=[name], environment={name: value})
    assert "hunter2" not in str(raised.value)


def test_a_variable_that_is_not_set_is_named(client: Client) -> None:
    with pytest.raises(SweepError, match="--env REGION is not set here; export it first"):
        jobs_of(client, variables=["REGION"], environment={})


def test_a_cluster_that_fails_is_named_in_a_line(client: Client) -> None:
    client.fails = RuntimeError("Request failed with status code 500:\n Traceback")
    with pytest.raises(ClusterError, match=r"^http://127\.0\.0\.1:8265: .* Traceback$"):
        jobs_of(client).of("a")


def test_without_pyproject_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"pyproject\.toml does not exist; .* --no-install"):
        dependencies(tmp_path)
