"""Where a cluster takes jobs, and the token that it asks for."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from search.sweep import SweepError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LOCAL = "http://127.0.0.1:8265"
"""Where `ray start --head` takes jobs."""

TOKEN_LINES = (
    "on the cluster's head run: ray get-auth-token --generate; "
    'then here: export RAY_AUTH_TOKEN="..."'
)


class ClusterError(ConnectionError):
    """A cluster does not answer, or does not let us in: one line says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a cluster takes jobs.

    Attributes:
        url: Without a slash at its end.
        token: Secret that Ray asks for; None if there is none.
    """

    url: str
    token: str | None

    @classmethod
    def find(cls, given: str | None, environment: Mapping[str, str], home: Path) -> Address:
        """Find address and token.

        Args:
            given: What was asked for; else RAY_API_SERVER_ADDRESS says it, else it is this machine.
            environment: Environment variables.
            home: The user's folder, where Ray keeps a token.

        Raises:
            SweepError: If the address is none, or not on this machine and there is no token.
        """
        url = (given or environment.get("RAY_API_SERVER_ADDRESS") or LOCAL).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SweepError(
                f"--address is {url!r}; give where the dashboard listens, for example {LOCAL}"
            )
        if parts.username or parts.password:
            raise SweepError(
                "--address holds a user or password; give them as a token: export RAY_AUTH_TOKEN"
            )
        token = _token(environment, home)
        if token is None and not is_loopback(parts.hostname):
            raise SweepError(
                f"--address {url} is not on this machine and there is no token, so anybody could "
                f"run code there; {TOKEN_LINES}"
            )
        return cls(url=url, token=token)

    def job_url(self, job: str) -> str:
        """Return the dashboard's page of a job."""
        return f"{self.url}/#/jobs/{job}"

    def connect(self) -> JobSubmissionClient:
        """Connect to the cluster.

        Raises:
            ClusterError: If it does not answer, or does not take the token.
        """
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # which Ray prefers to what it gets
            os.environ.pop(name, None)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            return JobSubmissionClient(self.url, headers=headers)
        except AuthenticationError as error:
            asked = "refuses the token" if self.token else "asks for a token"
            raise ClusterError(f"{self.url} {asked}; {TOKEN_LINES}") from error
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ClusterError(
                f"{self.url} does not answer ({reason}); start Ray there (ray start --head), "
                "or give --address"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether a name or number is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token(environment: Mapping[str, str], home: Path) -> str | None:
    """Find Ray's token where Ray looks for it."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if named := environment.get("RAY_AUTH_TOKEN_PATH"):
        path = Path(named)
        if not path.is_file():
            raise SweepError(
                f"RAY_AUTH_TOKEN_PATH is {named!r}, which is no file; give the file of a token"
            )
    else:
        path = home / ".ray" / "auth_token"
    return (path.read_text().strip() or None) if path.is_file() else None
