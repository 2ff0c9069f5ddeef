"""Files that come with the packages: sweeps to begin with, and the sample that they prune.

In a checkout they lie where their names say; where the wheel is installed, the names mean the same
files there.
"""

from __future__ import annotations

from pathlib import Path

from search.sweep.spec import Sweep

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the packages."""

SWEEPS = "search/sweeps"


def shipped_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of the package `search` that a relative path names; None if there is none."""
    path = (root / name).resolve()
    inside = path.is_relative_to(root / "search")
    return path if not Path(name).is_absolute() and inside and path.is_file() else None


def sweep_file(path: Path) -> Path:
    """Return a sweep's file, which may be named as a shipped one is: "sample", or its path."""
    if path.exists():
        return path
    names = [str(path)]
    if path.parent == Path() and path.suffix in ("", ".toml"):
        names.append(f"{SWEEPS}/{path.stem}.toml")
    return next((file for name in names if (file := shipped_file(name))), path)


def with_shipped_files(sweep: Sweep) -> Sweep:
    """Return a sweep in which names of shipped files lead to them, if nothing here is named so."""
    data = {split: getattr(sweep.data, split) for split in ("train", "val", "test")}
    found = {split: _found(name) for split, name in data.items()}
    model = _found(sweep.model.path)
    if found == data and model == sweep.model.path:
        return sweep
    return sweep.model_copy(
        update={
            "model": sweep.model.model_copy(update={"path": model}),
            "data": sweep.data.model_copy(update=found),
        }
    )


def _found(name: str | None) -> str | None:
    if name is None or Path(name).exists():
        return name
    return str(shipped_file(name) or name)
