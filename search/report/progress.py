"""Progress lines of a running sweep, and the table of its front."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from search.records.front import Front, cost_ratio
from search.records.trial_record import TrialRecord
from search.sweep.spec import Sweep

UNIT = {"effective_gmacs": "effective MACs", "gmacs": "MACs", "latency": "time per image"}

COLUMNS = (
    "trial",
    "val %",
    "test %",
    "epochs",
    "GMACs",
    "eff. GMACs",
    "fewer",
    "params",
    "density",
    "images/s",
)
"""Columns of the front's table."""

HEARTBEAT_S = 30.0
"""Longest silence while methods learn or trials run, in seconds."""


class Progress:
    """Prints a line per trial that ends, and now and then one with the running trials.

    Plain lines in any case: they read as well in a job's log as in a terminal.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        trials: int,
        epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Report on a sweep of that many trials, each of that many epochs."""
        self.stream, self.trials, self.epochs, self.clock = stream, trials, epochs, clock
        self.running: dict[str, TrialRecord] = {}
        self.ended = 0
        self.ended_before = 0  # by an earlier run of a sweep that is continued
        self.start = self.spoke = clock()
        self.trouble = ""

    def learning(self, labels: list[str]) -> None:
        """Print the methods that learn before the first trial."""
        self._say(f"learning once for all trials: {', '.join(labels)}")

    def still_learning(self, labels: list[str]) -> None:
        """Print the methods that are still learning."""
        took = duration(self.clock() - self.start)
        self._say(f"  learning for {took}, not done: {', '.join(labels)}")

    def learned(self, line: str) -> None:
        """Print the line of a learning run."""
        self._say(f"  {line}")

    def tuning_elastic(self) -> None:
        """Print that the elastic start is tuned before the first trial."""
        self._say("elastic start: tuning the dense model with plans of this sweep")

    def still_tuning_elastic(self) -> None:
        """Print for how long the elastic start has been tuned."""
        self._say(f"  tuning for {duration(self.clock() - self.start)}")

    def stopped(self, why: str) -> None:
        """Print the reason why the search stopped, unless all trials were run."""
        if why and why != f"{self.trials} trials":
            self._say(f"no more plans: {why}")

    def registered(self, lines: Sequence[str]) -> None:
        """Print the lines of the front's registration in MLflow."""
        for line in lines:
            self._say(line)

    def restart_clock(self) -> None:
        """Estimate the time that is left from here on: trials begin."""
        self.start = self.clock()

    def restored(self, ended: int) -> None:
        """Count the trials that ended in an earlier run."""
        self.ended = self.ended_before = ended

    def started(self, record: TrialRecord) -> None:
        """Note that a trial runs."""
        self.running[record.trial] = record

    def epoch(self, record: TrialRecord) -> None:
        """Note a trial's latest epoch."""
        self.running[record.trial] = record

    def goes_on(self, record: TrialRecord, reason: str) -> None:
        """Print that a trial resumes in another process, and the reason."""
        self._say(f"{self._count()} {record.name} goes on elsewhere: {reason}")

    def ended_with(self, record: TrialRecord, front: Front | None) -> None:
        """Print the line of a trial that has ended."""
        self.running.pop(record.trial, None)
        self.ended += 1
        self._say(f"{self._count()} {trial_line(record)}  {self._left()}")
        if front is not None and any(m.trial == record.trial for m in front.members):
            self._say(f"{' ' * len(self._count())} front: {front_line(front)}")

    def tick(self, trouble: str = "") -> None:
        """Print the running trials if nothing was printed for a while.

        Args:
            trouble: Why MLflow lags behind, which is said once; empty if it does not.
        """
        if trouble and not self.trouble:
            self._say(f"MLflow lags behind, trials go on: {trouble}")
        self.trouble = trouble
        if self.clock() - self.spoke >= HEARTBEAT_S and self.running:
            busy = ", ".join(
                f"{r.name} (epoch {r.epochs} of {self.epochs})"
                if r.history
                else f"{r.name} (starting)"
                for r in self.running.values()
            )
            self._say(f"{self._count()} running: {busy}  {self._left()}")

    def _count(self) -> str:
        return f"[{self.ended:>{len(str(self.trials))}}/{self.trials}]"

    def _left(self) -> str:
        here = self.ended - self.ended_before
        if here == 0 or self.ended >= self.trials:
            return ""
        seconds = (self.clock() - self.start) / here * (self.trials - self.ended)
        return f"about {duration(seconds)} left"

    def _say(self, line: str) -> None:
        print(line.rstrip(), file=self.stream, flush=True)
        self.spoke = self.clock()


def headline(sweep: Sweep, dense_cost: int) -> str:
    """Return a sweep's headline: name, trials, epochs, steps and budget.

    Args:
        sweep: The sweep.
        dense_cost: MACs of the dense model, as the sweep counts them.
    """
    steps, shares, dense = ", ".join(sweep.labels), sweep.shares, dense_cost / 1e9
    return (
        f"sweep {sweep.name}: {sweep.trials} trials of {sweep.epochs} epochs over {steps}; "
        f"{shares.low:.4g} to {shares.high:.4g} of {dense:.4g} {sweep.cost}, "
        f"{shares.low * dense:.4g} to {shares.high * dense:.4g}"
    )


def trial_line(record: TrialRecord) -> str:
    """Return the line of a trial that has ended."""
    if record.status in ("finished", "dense"):
        return (
            f"{record.name}: val {record.val_top1:.1f} %, {record.gmacs:.4g} GMACs "
            f"({record.effective_gmacs:.4g} effective), {duration(record.seconds)}"
            + (f" ({record.reason})" if record.reason else "")
        )
    return f"{record.name}: {record.status}" + (f", {record.reason}" if record.reason else "")


def front_line(front: Front) -> str:
    """Return the front in one line: cost and accuracy of each member, and the hypervolume."""
    points = ", ".join(
        f"{cost_ratio(front, member):.2f}x {member.val_top1:.1f} %" for member in front.members
    )
    return f"{points}; hypervolume {front.hypervolume:.4f}"


def front_table(front: Front, stream: TextIO) -> None:
    """Print the front: one row per member, dense model last, and below each row its plan."""
    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    unit = UNIT[front.cost]
    table = Table(
        title=f"Front of top-1 against {unit}", title_justify="left", box=None, pad_edge=False
    )
    for header in COLUMNS:
        table.add_column(header, justify="left" if header == "trial" else "right")
    for record in (*front.members, front.dense):
        table.add_row(*cells(front, record))
    console.print(table)
    print(f"\n'fewer': how many times fewer {unit} than the dense model.", file=stream)
    if any(record.spread is not None for record in front.members):
        runs = max(record.runs for record in front.members)
        print(f"'val %': mean of {runs - 1} further seeds ± spread of all {runs};", file=stream)
        print("~ : the next cheaper model may be as good.", file=stream)
    print("The plans:", file=stream)
    for record in front.members:
        print(
            textwrap.fill(
                record.plan_line,
                100,
                initial_indent=f"  {record.trial}  ",
                subsequent_indent=" " * 8,
            ),
            file=stream,
        )


def top1_text(record: TrialRecord) -> str:
    """Return validation top-1, with its spread where a plan was trained with several seeds.

    A "~" says that the next cheaper model of the front may be as good.
    """
    spread = "" if record.spread is None else f" ± {record.spread:.1f}"
    return f"{record.val_top1:.1f}{spread}" + ("~" if record.within_spread else "")


def duration(seconds: float) -> str:
    """Write a duration as 12 s, 3:05 min or 2:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def cells(front: Front, record: TrialRecord) -> tuple[str, ...]:
    """Return the cells of a row of the front's table, in the order of `COLUMNS`."""
    test = f"{record.test_top1:.1f}" if record.test_top1 is not None else "-"
    return (
        record.trial if record.origin != "dense" else "dense",
        top1_text(record),
        test,
        str(record.epochs),
        f"{record.gmacs:.4g}",
        f"{record.effective_gmacs:.4g}",
        f"{1 / cost_ratio(front, record):.2f}x",
        f"{record.params:,}",
        f"{record.density:.2f}",
        f"{record.images_per_s:,.0f}",
    )
