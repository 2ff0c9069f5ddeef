"""`python -m search run | show | export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from search.progress import front_table
from search.results import read_front
from search.sweep import SweepError, SweepFailedError, SweepInterruptedError
from search.sweep_file import check_files, load_sweep

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if a sweep failed, 2 if what was given is wrong, 3 if its front is smaller than the
        one it started from, 130 if it was interrupted.
    """
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args) or 0
    except (SweepError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SweepFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SweepInterruptedError as error:
        print(error, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m search", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser("run", help="run a sweep, or continue an interrupted one")
    run.add_argument("sweep", type=Path, help="TOML file of the sweep")
    run.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings; values are TOML: trials=8 data.batch_size=64",
    )
    run.set_defaults(run=_run)
    show = verbs.add_parser("show", help="print the front of a sweep again")
    show.add_argument("directory", type=Path, help="directory of the sweep")
    show.set_defaults(run=_show)
    export = verbs.add_parser("export", help="write a trial's model in all formats")
    export.add_argument("directory", type=Path, help="directory of the sweep")
    export.add_argument("--trial", required=True, help="trial, as the front names it")
    export.add_argument("--out", required=True, type=Path, help="directory to write")
    export.set_defaults(run=_export)
    return parser


def _run(args: argparse.Namespace) -> int:
    sweep = load_sweep(args.sweep, args.set)
    check_files(sweep)
    # What needs torch and Ray comes after what can go wrong without them.
    from search.run import run

    return run(sweep, sys.stdout)


def _show(args: argparse.Namespace) -> None:
    front_table(read_front(args.directory / "front.json"), sys.stdout)


def _export(args: argparse.Namespace) -> None:
    from search.export import export_trial

    export_trial(args.directory, args.trial, args.out, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
