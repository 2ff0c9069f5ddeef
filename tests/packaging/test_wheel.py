"""What the wheel holds, and a sweep from it, in a directory that has a `search` of its own."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cluster.jobs import dependencies
from search.records.files import read_front
from tests.packaging.wheel import Installed
from tests.processes import ROOT
from tests.sweeps import write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(360)]


def test_wheel_holds_all_files_of_the_packages_and_no_others(installed: Installed) -> None:
    held = {
        name
        for name in zipfile.ZipFile(installed.wheel).namelist()
        if not name.startswith("prunefront-")
    }
    packages = [ROOT / name for name in ("pruners", "search", "cluster")]
    files = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == files


def test_a_sweep_runs_where_a_folder_has_our_name(installed: Installed, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path)
    here = tmp_path / "here"
    for name in ("search", "pruners"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise RuntimeError('the user's own')")
    code = (
        "import search, pruners, cluster as c; print(search.__file__, pruners.__file__, c.__file__)"
    )
    found = installed.call("python", "-Pc", code, cwd=here)
    assert [Path(file).parents[1] for file in found.stdout.split()] == [installed.packages] * 3
    sets = ["--set", "trials=2", "ladder=1", "resources.cpu=2"]  # one process at a time
    done = installed.call("prunefront", "run", str(sweep), *sets, cwd=here, limit=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] " in done.stdout
    front = tmp_path / "results" / "tiny" / "front.json"
    assert read_front(front).members
    shown = installed.call("prunefront", "show", str(front.parent), cwd=here)
    assert shown.returncode == 0
    assert shown.stdout.strip() in done.stdout


def test_shipped_sweeps_are_found_by_name(installed: Installed, tmp_path: Path) -> None:
    code = """
from pathlib import Path
from search.sweep.shipped import sweep_file, with_shipped_files
from search.sweep.toml import check_files, load_sweep
for name in ("sample", "sample.toml", "search/sweeps/sample.toml"):
    sweep = with_shipped_files(load_sweep(sweep_file(Path(name))))
    check_files(sweep)
    print(sweep.model.path, sweep.data.train, sep="\\n")
"""
    done = installed.call("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {Path(line).parent for line in done.stdout.split()} == {
        installed.packages / "search" / "sample"
    }


def test_nodes_get_what_a_checkout_names(installed: Installed, tmp_path: Path) -> None:
    code = "from cluster.jobs import dependencies; print(*sorted(dependencies()), sep='\\n')"
    done = installed.call("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {_parts(line) for line in done.stdout.splitlines()} == set(map(_parts, dependencies()))


def _parts(requirement: str) -> frozenset[str]:
    """A requirement without the order of its limits, which the wheel's metadata change."""
    name = requirement.replace(">", ",>").replace("<", ",<")
    return frozenset(part for part in name.split(",") if part)
