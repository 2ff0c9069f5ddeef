"""Which plan comes next: first plans, then what Optuna asks for, then changes of the front's.

Nothing here knows Ray, so that a benchmark can search without it. The study lives in memory: asked
and told the same again, it comes to the same state.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
from optuna.trial import TrialState

from pruners import ViTShape
from search.records import pareto
from search.space.space import OutOfReachError, Proposal, Space
from search.space.step import Parameters
from search.strategy.samplers import make_sampler
from search.sweep.spec import Sweep, SweepFailedError

OBJECTIVES = ["val_top1", "cost_ratio"]
"""What a trial is told by: the first is maximised, the second minimised."""

REFUSALS = 200
"""Proposals in a row that may be out of reach or known already before the sweep gives up."""

CHANGED = 0.3
"""Share of a front member's numbers that a refined proposal changes."""

STEP = 0.15
"""Standard deviation of these changes, as a share of the number's range."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Result of a feasible proposal that was tuned to its full length."""

    name: str
    proposal: Proposal
    top1: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """Result of a plan that was tuned, perhaps not to its full length, as Optuna is told it."""

    top1: float
    cost: float
    constraints: Mapping[str, float]
    stopped: bool

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.top1, self.cost, *self.constraints.values())))

    @property
    def feasible(self) -> bool:
        return all(value <= 0.0 for value in self.constraints.values())


@dataclass(kw_only=True)
class _Asked:
    """A proposal that is being tried; `trial` is None where Optuna has not asked for it."""

    proposal: Proposal
    trial: optuna.Trial | None = None


@dataclass(kw_only=True)
class Proposer:
    """Asks for plans and is told their results.

    Attributes:
        sweep: The sweep.
        space: Its space.
        earlier: Parameters of an earlier sweep's front, which are tried right after the ladder.
        told: Results of all feasible proposals of full length.
        front: Those of them that no other beats, cheapest first.
    """

    sweep: Sweep
    space: Space
    earlier: Sequence[Parameters] = ()
    told: list[Told] = field(default_factory=list)
    front: list[Told] = field(default_factory=list)
    asked: dict[str, _Asked] = field(default_factory=dict)
    ended: dict[str, _Ended] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open a study and queue the first plans."""
        self.study = optuna.create_study(
            study_name=self.sweep.name,
            directions=["maximize", "minimize"],
            sampler=make_sampler(self.sweep.sampler, self.sweep.trials, self.sweep.seed),
        )
        self.study.set_user_attr("objectives", OBJECTIVES)
        self.finer = self.space.refined()
        self.rng = np.random.default_rng(self.sweep.seed)
        first = [("ladder", parameters) for parameters in self.space.ladder()]
        first += [("alone", parameters) for parameters in self.space.alone()]
        first += [("earlier", self._within(parameters)) for parameters in self.earlier]
        for origin, parameters in first:
            self.study.enqueue_trial(parameters, user_attrs={"origin": origin})

    def ask(self, name: str, position: int) -> tuple[str, Proposal]:
        """Return where a new proposal comes from, and the proposal.

        Args:
            name: What the proposal will be told by.
            position: How many trials there were before it.

        Raises:
            SweepFailedError: If too many proposals in a row cannot be used.
        """
        refine = position >= self.sweep.trials * (1.0 - self.sweep.refine)
        for _ in range(REFUSALS):
            if refine and self.told and self.finer.steps != self.space.steps:
                origin, trial, parameters = "refined", None, self._changed_member()
                space = self.finer
            else:
                trial = self.study.ask()
                origin = trial.user_attrs.get("origin", "search")
                parameters, space = self.space.sample(trial), self.space
            try:
                proposal = space.propose(parameters)
            except OutOfReachError:
                self._end(trial, TrialState.FAIL)
                continue
            if (before := self.known.setdefault(_plan_digest(proposal, space.dense), name)) != name:
                self._repeat(trial, before)
                continue
            self.asked[name] = _Asked(proposal=proposal, trial=trial)
            return origin, proposal
        raise SweepFailedError(
            f"{REFUSALS} proposals in a row were out of the budget's reach, or plans that were "
            "tried before; give a wider budget or fewer trials"
        )

    def tell(
        self,
        name: str,
        top1: float,
        cost: float,
        constraints: Mapping[str, float] | None = None,
        *,
        stopped: bool = False,
    ) -> None:
        """Tell the result of a proposal; a second time it changes nothing.

        Of one that was stopped Optuna is told what it had reached: less than it would have come to,
        but that serves the sampler better than nothing, and no worse than an extrapolation
        (`tests/benchmarks/search_quality_simulated.py`). It is never on the front.

        Args:
            name: The proposal's.
            top1: Percent, after its last epoch.
            cost: Cost ratio.
            constraints: Name -> value, above 0 where it is violated.
            stopped: Whether that was before its full length.
        """
        asked = self.asked.pop(name, None)
        if asked is None:
            return
        ended = _Ended(top1=top1, cost=cost, constraints=dict(constraints or {}), stopped=stopped)
        if not ended.finite:
            self._end(asked.trial, TrialState.FAIL)
            return
        self.ended[name] = ended
        if ended.feasible and not stopped:
            self.told.append(Told(name=name, proposal=asked.proposal, top1=top1, cost=cost))
            # What a member beats is beaten for good, so that no other need be compared again.
            self.front = _best([*self.front, self.told[-1]])
        self._complete(asked.trial, ended)

    def fail(self, name: str) -> None:
        """Tell that a proposal has failed."""
        self.tell(name, math.nan, math.nan)

    def _changed_member(self) -> Parameters:
        """Return a front member's parameters, site by site, changed a little at some places."""
        budget = self.rng.uniform(self.space.low, self.space.high)
        near = min(self.front, key=lambda told: abs(told.cost - budget))
        parameters = dict(near.proposal.parameters)
        if set(parameters) != {*self.finer.ranges(), *self.finer.choices()}:
            parameters = self.space.by_site(parameters)
        parameters["budget"] = budget
        ranges = {k: v for k, v in self.finer.ranges().items() if k != "budget"}
        changes = self.rng.random(len(ranges)) < max(CHANGED, 1.0 / len(ranges))
        steps = self.rng.normal(0.0, STEP, len(ranges))
        moved = zip(ranges.items(), changes, steps, strict=True)
        for (name, (low, high)), changed, step in moved:
            if changed:
                value = float(parameters[name]) + step * (high - low)
                parameters[name] = float(np.clip(value, low, high))
        return parameters

    def _within(self, parameters: Parameters) -> Parameters:
        """Keep what this space knows of an earlier sweep's parameters, within its bounds."""
        choices = self.space.choices()
        found = {k: v for k, v in parameters.items() if v in choices.get(k, ())}
        for name, (low, high) in self.space.ranges().items():
            if name in parameters:
                found[name] = min(max(float(parameters[name]), low), high)
        return found

    def _repeat(self, trial: optuna.Trial | None, before: str) -> None:
        """Tell Optuna the result of the same plan, if it is known, instead of trying it again."""
        if (ended := self.ended.get(before)) is not None:
            self._complete(trial, ended)
        else:
            self._end(trial, TrialState.FAIL)

    def _complete(self, trial: optuna.Trial | None, ended: _Ended) -> None:
        """Tell Optuna, which wants the same constraints of every complete trial."""
        if trial is None:
            return
        for name, value in ended.constraints.items():
            trial.set_constraint(name, value)
        if ended.stopped:
            trial.set_user_attr("stopped", True)
        self.study.tell(trial, [ended.top1, ended.cost])

    def _end(self, trial: optuna.Trial | None, state: TrialState) -> None:
        if trial is not None:
            self.study.tell(trial, state=state)


def _best(told: Sequence[Told]) -> list[Told]:
    best = pareto.front([t.cost for t in told], [t.top1 for t in told])
    return sorted((t for t, keeps in zip(told, best, strict=True) if keeps), key=lambda t: t.cost)


def _plan_digest(proposal: Proposal, dense: ViTShape) -> str:
    """Digest of what makes two plans the same: methods, and what each leaves of the model.

    Not the shares: units are whole, so that many shares cut the same.
    """
    shape, found = dense, hashlib.sha256()
    for step in proposal.plan.steps:
        if step.active and (left := step.pruner.shrink(shape, step.thresholds)) != shape:
            shape = left
            found.update(repr((step.pruner, json.dumps(shape.to_json(), sort_keys=True))).encode())
    return found.hexdigest()
