"""Deletes checkpoints that a continued sweep cannot ask for any more.

Ray can keep the last few of each trial itself (`num_to_keep`), but then takes a snapshot of the
whole sweep every few epochs of every trial, so that a sweep of n trials writes n^2 of them. Here
snapshots stay as rare as Ray makes them, a twentieth of the driver's time at most, and a checkpoint
goes when a newer one is named in snapshots that are safely on disk.
"""

from __future__ import annotations

import shutil
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

SNAPSHOTS = 2
"""Snapshots before the one that is being taken, of which one is on disk: Ray writes them in the
background, and leaves one out while another is still being written."""


class OldCheckpoints(tune.Callback):
    """Deletes what neither this snapshot of a sweep names nor the last ones."""

    def __init__(self, folder: Path) -> None:
        """Find what an earlier process left.

        Args:
            folder: Where the trials have a directory each.
        """
        self.held: dict[str, list[Path]] = defaultdict(list)  # trial -> its checkpoints, old first
        self.named: deque[dict[str, Path]] = deque(maxlen=SNAPSHOTS)  # the newest in each snapshot
        for path in sorted(folder.glob("*/checkpoint_*")):
            self.held[path.parent.name].append(path)

    def on_checkpoint(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        checkpoint: tune.Checkpoint,
        **info: Any,
    ) -> None:
        """Hold a trial's new checkpoint; a continued trial writes some a second time."""
        path = Path(checkpoint.path)
        before = [held for held in self.held[path.parent.name] if held.name < path.name]
        self.held[path.parent.name] = [*before, path]

    def get_state(self) -> None:
        """Delete what is older than in the last snapshots; Ray calls this as it takes one."""
        if len(self.named) == SNAPSHOTS:
            self._delete_before(self.named[0])
        self.named.append({trial: paths[-1] for trial, paths in self.held.items()})

    def end(self) -> None:
        """Delete all but each trial's newest checkpoint: no trial will run again."""
        self._delete_before({trial: paths[-1] for trial, paths in self.held.items()})

    def _delete_before(self, newest: dict[str, Path]) -> None:
        for trial, path in newest.items():
            paths = self.held[trial]
            for old in (held for held in paths if held.name < path.name):
                # What cannot be deleted takes space, but is no reason to end a sweep.
                shutil.rmtree(old, ignore_errors=True)
            self.held[trial] = [held for held in paths if held.name >= path.name]
