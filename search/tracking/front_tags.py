"""Tag `front` of the trials' runs: "true" for the members of the front."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.tracking import MlflowClient

from search.records.front import Front
from search.tracking.run_ids import RunIds

_MOST_RUNS = 50_000  # that MLflow returns in one answer


class FrontTags:
    """Keeps the tag of one sweep's runs, changing no more of them than a front has changed."""

    def __init__(self, client: MlflowClient, ids: RunIds) -> None:
        """Tag nothing yet: runs may carry tags of a driver before, looked up at the first front."""
        self.client, self.ids = client, ids
        self._tagged: set[str] | None = None

    def update(self, front: Front, runs: Mapping[str, str]) -> None:
        """Tag new members of a front and untag former ones.

        Args:
            front: The front.
            runs: Trial -> run.
        """
        if self._tagged is None:
            self._tagged = self._found()
        members = {member.trial for member in front.members}
        for trial in sorted(members ^ self._tagged):
            value = "true" if trial in members else "false"
            self.client.set_tag(runs[trial], "front", value)
            self._tagged = self._tagged ^ {trial}

    def _found(self) -> set[str]:
        """Return the trials whose runs are tagged in MLflow."""
        filter_ = f"tags.`mlflow.parentRunId` = '{self.ids.parent}' AND tags.front = 'true'"
        found = self.client.search_runs([self.ids.experiment], filter_, max_results=_MOST_RUNS)
        return {run.data.tags["trial"] for run in found}
