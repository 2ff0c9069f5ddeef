"""What a job is sent: the code, the sweep, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from search.sweep import ROOT, Sweep, SweepError, shipped_file

PACKAGES = ("search", "pruners")
"""Packages that a job runs; nodes need no copy of their own."""

SWEEP = "sweep.toml"
"""Name of the sweep in what is sent."""

MOST_MB = 50
"""Largest upload. Ray takes 100 MiB, compressed, and keeps it in the head's memory."""


def stage(path: Path, sweep: Sweep, folder: Path, root: Path = ROOT) -> None:
    """Copy what a job needs into an empty folder.

    Args:
        path: TOML file of the sweep.
        sweep: What is in it, overrides included.
        folder: Where to copy to.
        root: Folder that holds the packages.

    Raises:
        SweepError: If it is too large.
    """
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            _copy(source, root, folder)
    for source in shipped(sweep, root):
        _copy(source, root, folder)
    shutil.copyfile(path, folder / SWEEP)
    _refuse_large(folder)


def shipped(sweep: Sweep, root: Path = ROOT) -> list[Path]:
    """Return the files of the packages' own sample that a sweep names by relative paths."""
    data = sweep.data
    named = [sweep.model.path, data.train, data.val, data.test]
    return [root / name for name in named if name is not None and shipped_file(name, root)]


def refuse_what_stays_behind(sweep: Sweep, root: Path = ROOT) -> None:
    """Refuse paths that mean nothing on a cluster: relative ones, unless they are sent.

    Raises:
        SweepError: For the first.
    """
    named = {"model.path": sweep.model.path, "start_from": sweep.start_from}
    named |= {f"data.{split}": getattr(sweep.data, split) for split in ("train", "val", "test")}
    for key, value in named.items():
        if (
            value is None
            or "://" in value
            or Path(value).is_absolute()
            or shipped_file(value, root)
        ):
            continue
        raise SweepError(
            f"{key} is {value!r}, which the job would not find; give a URI, "
            "or an absolute path that all nodes see"
        )
    if not Path(sweep.storage).is_absolute():
        raise SweepError(
            f"storage is {sweep.storage!r}, which goes when the job ends; give an absolute path "
            "that all nodes see: --set 'storage=\"/shared/results\"'"
        )


def _copy(source: Path, root: Path, folder: Path) -> None:
    target = folder / source.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _refuse_large(folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MOST_MB * 1e6:
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
        named = ", ".join(f"{p.relative_to(folder)} ({sizes[p] / 1e6:.0f} MB)" for p in largest)
        raise SweepError(
            f"the upload has {total / 1e6:.0f} MB, more than {MOST_MB}; the largest files are "
            f"{named}; move data out of the packages"
        )
