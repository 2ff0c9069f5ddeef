"""The proposer behind Ray Tune: hands out trials, tells what came of them, trains the best again.

Ray's own `OptunaSearch` is not used: it cannot tell a stopped trial from a finished one, and leaves
a trial with a NaN result RUNNING for ever, which a sampler then avoids. Here every trial that was
asked for is told: COMPLETE with both objectives (of a stopped one, those it had reached), or FAIL.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pruners import Plan
from search.records.constraints import violations
from search.records.ledger import Event, Ledger
from search.space.space import Space
from search.space.step import Parameters
from search.strategy.confirm import standard_error, to_confirm, to_train_long
from search.strategy.proposer import OBJECTIVES, Proposer, Told
from search.strategy.stopping import why_stop
from search.sweep.spec import Sweep, SweepError, SweepFailedError

Config = dict[str, Any]


class PlanSearcher(Searcher):
    """Hands out the dense model, then what the proposer proposes, then the best ones again.

    Where it had come to when an earlier driver died follows from the ledger: what it was asked and
    told then is repeated, so that the sampler is in the same state. What was running is handed out
    again first.

    Attributes:
        stopped: Why no more plans are asked for; empty as long as they are.
        finished: Whether everything has been handed out.
    """

    def __init__(
        self,
        sweep: Sweep,
        space: Space,
        ledger: Ledger,
        *,
        earlier: Sequence[Parameters] = (),
        val_images: int = 1_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start a search, or continue one.

        Args:
            sweep: The sweep.
            space: Its space.
            ledger: The sweep's.
            earlier: Parameters of an earlier sweep's front.
            val_images: Images that top-1 is measured on, which decides what a near miss is.
            clock: Seconds.

        Raises:
            SweepError: If the ledger says that something else was proposed.
        """
        super().__init__()
        self.sweep, self.val_images, self.clock = sweep, val_images, clock
        self.ledger = ledger
        self.proposer = Proposer(sweep=sweep, space=space, earlier=earlier)
        self.asked = 0
        self.configs: dict[str, Config] = {}  # Ray's trial id -> what runs under it
        self.waiting: list[Config] = []  # to be trained again
        self.repeats: dict[str, list[float]] = {}
        self.phase = "search"
        self.stopped, self.finished = "", False
        self.dense: dict[str, Any] | None = None  # result of the dense model
        self.early: list[tuple[str, dict[str, Any]]] = []  # of trials that ended before it
        self.start = clock()
        self._repeat(ledger.past)
        self.interrupted = list(self.configs)

    @property
    def study(self) -> optuna.Study:
        """The study of the search."""
        return self.proposer.study

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept the run; the objectives are the sweep's own."""
        return True

    def suggest(self, trial_id: str) -> Config | str | None:
        """Return the configuration of the next trial, None to wait, or that there are no more."""
        if self.interrupted:
            config: Config | str | None = self.configs.pop(self.interrupted.pop(0))
        else:
            config = self._next()
            if isinstance(config, dict):
                self.ledger.ask(config)
                self.asked += 1
        if isinstance(config, dict):
            self.configs[trial_id] = config
        elif config == Searcher.FINISHED:
            self.finished = True
        return config

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take what came of a trial; whether one whose process failed goes on is said later."""
        config = None if error else self.configs.pop(trial_id, None)
        if config is not None:  # else it was told before
            self._end(config, result)

    def hand_out_again(self, trial_id: str, parts: int) -> None:
        """Let a trial whose process failed go on, with batches in so many parts."""
        self.configs[trial_id] = {**self.configs[trial_id], "parts": parts}
        self.interrupted.append(trial_id)

    def give_up(self, trial_id: str) -> None:
        """Take a trial as failed."""
        self._end(self.configs.pop(trial_id), None)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: Ray's snapshots are not used, the ledger holds the search."""

    def export_study(self, path: Path) -> None:
        """Copy the study to a SQLite file, which optuna-dashboard opens.

        What was stopped is pruned there, so that it is not among the best.
        """
        path.unlink(missing_ok=True)
        study = optuna.create_study(
            study_name=self.study.study_name,
            directions=self.study.directions,
            storage=f"sqlite:///{path}",
        )
        study.set_user_attr("objectives", OBJECTIVES)
        trials = self.study.get_trials(states=_TOLD)
        for trial in trials:
            if "stopped" in trial.user_attrs:
                trial.state, trial.values = TrialState.PRUNED, None
        study.add_trials(trials)

    def _repeat(self, events: Sequence[Event]) -> None:
        """Do again what earlier drivers did."""
        last: dict[str, dict[str, Any]] = {}  # trial -> its latest result
        for event in events:
            if event["event"] == "asked":
                config, name = self._following(), event["config"]["trial"]
                if config != event["config"]:
                    raise SweepError(
                        f"trial {name} of {self.sweep.directory} was proposed otherwise, by "
                        "another version of this package or of Optuna; go on with that, or start "
                        "another sweep from its front (start_from)"
                    )
                self.configs[name] = event["config"]
                self.asked += 1
            elif event["event"] == "epoch":
                last[event["result"]["trial"]] = event["result"]
            elif event["event"] == "ended":
                failed = event["status"] == "failed"
                result = None if failed else last.get(event["trial"])
                self._end(self.configs.pop(event["trial"]), result)
            elif event["event"] == "stopped":
                self.stopped = event["why"]

    def _next(self) -> Config | str | None:
        """Return the next configuration, unless it is time to stop."""
        if self.asked and not self.stopped:
            seconds = self.ledger.seconds + self.clock() - self.start
            self._stop(why_stop(self.sweep, self.asked, seconds, self.proposer.told))
        return self._following()

    def _following(self) -> Config | str | None:
        name = f"{self.asked:04d}"
        if self.asked == 0:
            return _config(name, "dense", Plan(), epochs=0, cost_ratio=1.0)
        if not self.stopped:
            try:
                return self._proposed(name)
            except SweepFailedError as error:
                if self.asked == 1:
                    raise
                self._stop(str(error))  # what was found is trained again all the same
        while not self.waiting:
            if self.configs:  # which the next phase depends on, and which may have to go on
                return None
            if not self._later_phases():
                return Searcher.FINISHED
            self._next_phase()
        return {**self.waiting.pop(0), "trial": name}

    def _stop(self, why: str) -> None:
        if why:
            self.stopped = why
            self.ledger.stop(why)

    def _end(self, config: Config, result: dict[str, Any] | None) -> None:
        """Take the last result of a trial that ended; None if it failed."""
        status = "failed" if result is None else result.get("status", "failed")
        whole = result if status == "finished" else None
        # Ray's scheduler stops trials that run, and some stop themselves.
        measured = result if status in ("finished", "running", "stopped") else None
        if config["origin"] == "dense":
            self._measured(whole)
        elif config["of"]:
            if config["origin"] == "confirm" and whole and math.isfinite(whole["val_top1"]):
                self.repeats.setdefault(config["of"], []).append(float(whole["val_top1"]))
        elif measured and self.dense is not None:
            self._tell(config["trial"], measured)
        elif measured and any(c["origin"] == "dense" for c in self.configs.values()):
            self.early.append((config["trial"], measured))
        else:
            self.proposer.fail(config["trial"])

    def _proposed(self, name: str) -> Config:
        origin, proposal = self.proposer.ask(name, self.asked)
        return _config(
            name,
            origin,
            proposal.plan,
            epochs=self.sweep.epochs,
            cost_ratio=proposal.cost_ratio,
            learned=proposal.scores,
            parameters=dict(proposal.parameters),
        )

    def _later_phases(self) -> list[str]:
        """Return the phases that are still to come."""
        phases = ["search"]
        phases += ["confirm"] if self.sweep.confirm else []
        phases += ["final"] if self.sweep.final_epochs else []
        return phases[phases.index(self.phase) + 1 :]

    def _next_phase(self) -> None:
        """Queue what is trained again."""
        self.phase = self._later_phases()[0]
        told = self.proposer.told
        if not told:
            return
        if self.phase == "confirm":
            margin = standard_error(max(t.top1 for t in told), self.val_images)
            self.waiting = [
                self._again(t, "confirm", self.sweep.epochs, seed)
                for t in to_confirm(told, margin)
                for seed in range(1, self.sweep.confirm + 1)
            ]
        else:
            self.waiting = [
                self._again(t, "final", self.sweep.final_epochs, 0)
                for t in to_train_long(told, self.repeats)
            ]

    def _measured(self, dense: dict[str, Any] | None) -> None:
        """Take the dense model's result, None if there is none, and tell what waited for it."""
        self.dense, early, self.early = dense, self.early, []
        if dense is None:  # without it there is no front
            self.stopped = "the dense model could not be measured"
        for name, ended in early:
            if dense is None:
                self.proposer.fail(name)
            else:
                self._tell(name, ended)

    def _again(self, told: Told, origin: str, epochs: int, seed: int) -> Config:
        proposal = told.proposal
        return _config(
            "",
            origin,
            proposal.plan,
            epochs=epochs,
            cost_ratio=proposal.cost_ratio,
            learned=proposal.scores,
            parameters=dict(proposal.parameters),
            of=told.name,
            seed=seed,
        )

    def _tell(self, name: str, result: dict[str, Any]) -> None:
        """Tell the proposer what a trial came to."""
        if self.dense is None:
            raise AssertionError("the dense model comes first")
        cost = result["cost_ratio"]
        if self.sweep.cost == "latency":
            cost = result["latency_ms"] / self.dense["latency_ms"]
        constraints = violations(
            self.sweep.constraints,
            params=result["params"],
            images_per_s=result["images_per_s"],
            drop=self.dense["val_top1"] - result["val_top1"],
        )
        stopped = result["status"] != "finished"
        if stopped and "max_drop" in constraints:  # what it had lost, it might have won back
            constraints["max_drop"] = min(0.0, constraints["max_drop"])
        top1 = float(result["val_top1"])
        self.proposer.tell(name, top1, float(cost), constraints, stopped=stopped)


_TOLD = (TrialState.COMPLETE, TrialState.FAIL)


def _config(name: str, origin: str, plan: Plan, **values: Any) -> Config:
    """Return a trial's configuration; Ray keeps it with each result, where text takes less."""
    return {
        "trial": name,
        "origin": origin,
        "plan": json.dumps(plan.to_json()),
        "learned": "",
        "parameters": {},
        "of": "",
        "seed": 0,
        **values,
    }
