"""`python -m search run | show | report | compare | export | promote`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from search.records.files import read_front
from search.report.progress import front_table
from search.sweep.shipped import sweep_file, with_shipped_files
from search.sweep.spec import SweepError, SweepFailedError, SweepInterruptedError
from search.sweep.toml import check_files, load_sweep

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None, program: str = "python -m search") -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; else that of this process.
        program: What people have typed.

    Returns:
        0; 1 if a sweep failed, 2 if an argument or a file is wrong, 3 if its front is smaller than
        the one it started from, 130 if it was interrupted.
    """
    args = _parser(program).parse_args(arguments)
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


def _parser(program: str = "python -m search") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser("run", help="run a sweep, or continue an interrupted one")
    run.add_argument(
        "sweep", type=Path, help="TOML file of the sweep, or the name of a shipped one"
    )
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
    report = verbs.add_parser("report", help="write a sweep as one page")
    report.add_argument("directory", type=Path, help="directory of the sweep")
    report.add_argument("--out", required=True, type=Path, help="page to write, report.html")
    report.add_argument("--pictures", type=Path, help="folder for its pictures as PNG files")
    report.set_defaults(run=_report)
    compare = verbs.add_parser("compare", help="compare the fronts of sweeps of one model")
    compare.add_argument("directories", nargs="+", type=Path, help="directories of the sweeps")
    compare.add_argument("--out", type=Path, help="page to write, compare.html")
    compare.set_defaults(run=_compare)
    export = verbs.add_parser("export", help="write a trial's model in all formats")
    export.add_argument("directory", type=Path, help="directory of the sweep")
    export.add_argument("--trial", required=True, help="trial, as the front names it")
    export.add_argument("--out", required=True, type=Path, help="directory to write")
    export.set_defaults(run=_export)
    promote = verbs.add_parser("promote", help="approve a version of a registered model")
    promote.add_argument("model", help="registered model, as MLflow names it")
    promote.add_argument("version", help="number of the version")
    promote.add_argument(
        "--tracking",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="MLflow tracking URI, or directory of a sweep; MLFLOW_TRACKING_URI if not given",
    )
    promote.set_defaults(run=_promote)
    return parser


def _run(args: argparse.Namespace) -> int:
    sweep = with_shipped_files(load_sweep(sweep_file(args.sweep), args.set))
    check_files(sweep)
    # Imports of torch and Ray take seconds: errors that need neither come first.
    from search.run import run

    return run(sweep, sys.stdout)


def _show(args: argparse.Namespace) -> None:
    front_table(read_front(args.directory / "front.json"), sys.stdout)


def _report(args: argparse.Namespace) -> None:
    from search.report.report import write_report

    write_report(args.directory, args.out, args.pictures)
    print(f"wrote {args.out}")


def _compare(args: argparse.Namespace) -> None:
    from search.report.compare import print_comparison, read_fronts, write_comparison

    fronts = read_fronts(args.directories)
    print_comparison(fronts, sys.stdout)
    if args.out is not None:
        write_comparison(fronts, args.out)
        print(f"wrote {args.out}")


def _export(args: argparse.Namespace) -> None:
    from search.export import export_trial

    export_trial(args.directory, args.trial, args.out, sys.stdout)


def _promote(args: argparse.Namespace) -> None:
    from search.tracking.promote import promote

    for line in promote(args.model, args.version, args.tracking):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
