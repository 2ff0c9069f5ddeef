from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.trial.watchdog import ends_if_hung, has_hung
from tests.processes import ROOT

HANGS = """
import sys, time
from pathlib import Path
from search.trial.watchdog import ends_if_hung

def stuck():
    {how}

with ends_if_hung(Path(sys.argv[1]), 0.5):
    stuck()
print("went on")
"""


@pytest.mark.parametrize(
    "how",
    [
        "time.sleep(60)",
        "import re; re.match('(a*)*b', 'a' * 60)",  # in C, with Python's lock
    ],
)
def test_what_hangs_is_ended_and_says_where(how: str, tmp_path: Path) -> None:
    path = tmp_path / "models" / "hung.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(how=how), str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert has_hung(path)
    assert "in stuck" in path.read_text()


def test_what_ends_in_time_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hung.txt"
    with ends_if_hung(path, 30.0):
        assert not has_hung(path)
    assert not path.exists()
    assert not has_hung(path)


def test_what_fails_by_itself_is_not_called_hung(tmp_path: Path) -> None:
    path = tmp_path / "hung.txt"
    with pytest.raises(ValueError, match="its own"), ends_if_hung(path, 30.0):
        raise ValueError("its own")
    assert not path.exists()
