"""`python -m cluster submit | status | logs | stop | due | next`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.connection import Address
from cluster.jobs import LIVE, JobExistsError, Jobs
from search.sweep import SweepError, sweep_file

if TYPE_CHECKING:
    from cluster.schedules import Schedule

SCHEDULES = Path(__file__).parent / "schedules.toml"


def main(arguments: Sequence[str] | None = None, program: str = "python -m cluster") -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; else that of this process.
        program: What people have typed.

    Returns:
        0; 1 if the cluster or a job failed, 2 if what was given is wrong, 130 if it was
        interrupted; of a job that is followed its own exit code.
    """
    args = _parser(program).parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ConnectionError, JobExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("no longer followed; the job goes on", file=sys.stderr)
        return 130


def _parser(program: str = "python -m cluster") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.set_defaults(program=program)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    submit = _verb(verbs, "submit", _submit, "run a sweep as a job")
    submit.add_argument(
        "sweep", type=Path, help="TOML file of the sweep, or the name of a shipped one"
    )
    submit.add_argument("--name", help="name of the sweep, instead of the file's")
    submit.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings, as `python -m search run` does",
    )
    submit.add_argument("--follow", action="store_true", help="print its log until it ends")
    _add_runtime(submit)

    status = _verb(verbs, "status", _status, "say how the jobs of sweeps stand")
    status.add_argument("name", nargs="?", help="name of a sweep; all of them without one")
    logs = _verb(verbs, "logs", _logs, "print what the last job of a sweep has printed")
    logs.add_argument("name", help="name of the sweep")
    logs.add_argument("--follow", action="store_true", help="go on until it ends")
    stop = _verb(verbs, "stop", _stop, "stop a sweep; submitted again, it goes on")
    stop.add_argument("name", help="name of the sweep")

    due = _verb(verbs, "due", _due, "submit the scheduled sweeps that are due; run it each minute")
    _add_schedules(due)
    due.add_argument(
        "--tracking", help="MLflow, where slots are recorded; else MLFLOW_TRACKING_URI says it"
    )
    how = due.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would be done")
    how.add_argument("--follow", action="store_true", help="wait for what was submitted")
    _add_runtime(due)
    coming = verbs.add_parser("next", help="show the slots of the coming week")
    _add_schedules(coming)
    coming.set_defaults(run=_next)
    return parser


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help)
    verb.add_argument(
        "--address",
        help="where the dashboard listens; else RAY_API_SERVER_ADDRESS, else this machine",
    )
    verb.set_defaults(run=run)
    return verb


def _add_schedules(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--schedules", type=Path, default=SCHEDULES, help="TOML file; else cluster/schedules.toml"
    )


def _add_runtime(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--env",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="environment variables that the job gets from here; no secrets",
    )
    verb.add_argument(
        "--no-install",
        dest="install",
        action="store_false",
        help="the nodes have the packages of pyproject.toml: install nothing",
    )


def _address(args: argparse.Namespace) -> Address:
    return Address.find(args.address, os.environ, Path.home())


def _submit(args: argparse.Namespace) -> int:
    jobs = Jobs(_address(args), install=args.install, variables=args.env)
    overrides = [*args.set, *([f'name="{args.name}"'] if args.name else [])]
    job = jobs.submit(sweep_file(args.sweep), overrides)
    name = job[: job.rindex("-", 0, job.rindex("-"))]  # without day and time
    print(f"submitted job {job}: {jobs.address.job_url(job)}")
    if args.follow:
        return jobs.follow(job, partial(print, end="", flush=True))
    print(f"follow it: {args.program} logs {name} --follow{_same_address(args)}")
    print(f"stop it:   {args.program} stop {name}{_same_address(args)}")
    return 0


def _same_address(args: argparse.Namespace) -> str:
    return f" --address {args.address}" if args.address else ""


def _status(args: argparse.Namespace) -> int:
    jobs = Jobs(_address(args))
    found = [jobs.latest(args.name)] if args.name else jobs.of()
    if not found:
        print("no sweeps")
    for job in found:
        began = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
        print(f"{job.submission_id}  {job.status}  since {began:%Y-%m-%d %H:%M} UTC")
        lines = jobs.logs(job.submission_id).splitlines()
        print(f"  {lines[-1]}" if lines else "  nothing printed yet")
    return 1 if args.name and found[0].status == "FAILED" else 0


def _logs(args: argparse.Namespace) -> int:
    jobs = Jobs(_address(args))
    job = jobs.latest(args.name).submission_id
    if args.follow:
        return jobs.follow(job, partial(print, end="", flush=True))
    print(jobs.logs(job), end="")
    return 0


def _stop(args: argparse.Namespace) -> int:
    jobs = Jobs(_address(args))
    job = jobs.latest(args.name)
    if job.status not in LIVE:
        print(f"job {job.submission_id} has ended already: {job.status}")
        return 0
    jobs.stop(job.submission_id)
    print(f"stopped job {job.submission_id}; submitted again, the sweep goes on")
    return 0


def _schedules(args: argparse.Namespace) -> tuple[Schedule, ...]:
    from cluster.schedules import load_schedules  # reads cron lines by a library

    return load_schedules(args.schedules)


def _due(args: argparse.Namespace) -> int:
    from cluster.due import dry_run, due
    from cluster.slots import Slots  # imports MLflow: seconds, and not on every laptop

    schedules = _schedules(args)
    if not (tracking := args.tracking or os.environ.get("MLFLOW_TRACKING_URI")):
        raise SweepError(
            "due needs MLflow, to record what ran; give --tracking http://..., "
            "or export MLFLOW_TRACKING_URI"
        )
    jobs = Jobs(_address(args), install=args.install, variables=args.env)
    act = dry_run if args.dry_run else due
    outcome = act(schedules, Slots(tracking), jobs, datetime.now(UTC), sys.stdout)
    codes = [outcome.exit_code]
    if args.follow:
        codes += [jobs.follow(job, partial(print, end="", flush=True)) for job in outcome.submitted]
    return max(codes)


def _next(args: argparse.Namespace) -> int:
    from cluster.due import show_coming

    show_coming(_schedules(args), datetime.now(UTC), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
