from __future__ import annotations

from pathlib import Path

import pytest

from cluster.connection import LOCAL, Address, ClusterError, is_loopback
from search.sweep.spec import SweepError
from tests.cluster.head import TOKEN
from tests.processes import free_port

FAR = "https://ray.example.org"


@pytest.mark.parametrize(
    ("given", "variables", "url"),
    [
        (None, {}, LOCAL),
        (None, {"RAY_API_SERVER_ADDRESS": "http://localhost:9000/"}, "http://localhost:9000"),
        ("http://[::1]:1", {"RAY_API_SERVER_ADDRESS": "http://localhost:2"}, "http://[::1]:1"),
    ],
)
def test_where_jobs_go(
    given: str | None, variables: dict[str, str], url: str, tmp_path: Path
) -> None:
    found = Address.find(given, variables, tmp_path)
    assert found == Address(url=url, token=None)
    assert found.job_url("a-1") == f"{url}/#/jobs/a-1"


def test_a_token_is_found_where_ray_finds_it(tmp_path: Path) -> None:
    assert Address.find(FAR, {"RAY_AUTH_TOKEN": " secret "}, tmp_path).token == "secret"
    named = tmp_path / "token"
    named.write_text("named\n")
    assert Address.find(FAR, {"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path).token == "named"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("kept")
    assert Address.find(FAR, {}, tmp_path).token == "kept"
    both = {"RAY_AUTH_TOKEN": "first", "RAY_AUTH_TOKEN_PATH": str(named)}
    assert Address.find(FAR, both, tmp_path).token == "first"
    with pytest.raises(SweepError, match="RAY_AUTH_TOKEN_PATH is '/nowhere', which is no file"):
        Address.find(FAR, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, tmp_path)


@pytest.mark.parametrize("url", [FAR, "http://10.0.0.7:8265", "http://0.0.0.0:8265"])
def test_other_machines_need_a_token(url: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"no token.* run: ray get-auth-token --generate"):
        Address.find(url, {}, tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("\n")  # an empty one is none
    with pytest.raises(SweepError, match="no token"):
        Address.find(url, {}, tmp_path)


@pytest.mark.parametrize("url", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", "http://"])
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="give where the dashboard listens"):
        Address.find(url, {"RAY_AUTH_TOKEN": "a"}, tmp_path)


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(SweepError) as raised:
        Address.find("https://me:hunter2@ray.example.org", {}, tmp_path)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("localhost.example.org", False),
        ("192.168.0.1", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_cluster_that_does_not_answer_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match=rf"{url} does not answer .*; start Ray there"):
        Address(url=url, token=None).connect()


def test_a_cluster_says_whether_the_token_is_right(cluster: dict[str, str]) -> None:
    url = cluster["RAY_API_SERVER_ADDRESS"]
    with pytest.raises(ClusterError, match=r"asks for a token; .*ray get-auth-token --generate"):
        Address(url=url, token=None).connect()
    with pytest.raises(ClusterError, match=r"refuses the token; .*export RAY_AUTH_TOKEN") as raised:
        Address(url=url, token="wrong-token").connect()
    assert "wrong-token" not in str(raised.value)
    assert Address(url=url, token=TOKEN).connect().get_address() == url
