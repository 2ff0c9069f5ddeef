"""The ended trials of an arm and seed: a file of JSON lines that only ever grows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from anytime import Ended

from pruners.model.files import replace_file


class Journal:
    """Trials that have ended, in order; each is a whole line as soon as it has."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that was torn when its process died is taken out."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            replace_file(path, lambda temporary: temporary.write_text(whole))
        self.trials = [Ended(**json.loads(line)) for line in whole.splitlines()]

    def find(self, number: int, what: str) -> Ended | None:
        """Return the trial of a number, if it has ended.

        Raises:
            ValueError: If something else was tried under that number.
        """
        if number >= len(self.trials):
            return None
        trial = self.trials[number]
        if (trial.number, trial.what) != (number, what):
            raise ValueError(
                f"{self.path} has {trial.what!r} as trial {number}, and now it is {what!r}; "
                "the code has changed: move the file away"
            )
        return trial

    def add(self, trial: Ended) -> None:
        """Append a trial."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        self.trials.append(trial)


def read_only(path: Path) -> list[Ended]:
    """Return the trials of a file that another process may be writing to; none without one."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [Ended(**json.loads(line)) for line in lines]
