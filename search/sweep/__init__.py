"""A sweep's TOML file as a checked model. Imports neither torch nor Ray.

The names that `cluster` uses are here.
"""

from search.sweep.shipped import ROOT, shipped_file, sweep_file
from search.sweep.spec import PASSWORD, Sweep, SweepError
from search.sweep.toml import load_sweep, problem_line
from search.sweep.tracking_uri import SQLITE, artifacts_beside, sqlite_file

__all__ = [
    "PASSWORD",
    "ROOT",
    "SQLITE",
    "Sweep",
    "SweepError",
    "artifacts_beside",
    "load_sweep",
    "problem_line",
    "shipped_file",
    "sqlite_file",
    "sweep_file",
]
