"""A plan says, site by site, what share of the network goes; its cost is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

from pruners.families.learned import Learned, LearnedPruner
from pruners.families.pruner import FAMILIES, Pruner, load_method
from pruners.families.unit import UnitPruner
from pruners.model.compensation import compensate
from pruners.model.shape import ViTShape
from pruners.model.sites import WIDTH
from pruners.model.types import Batches, Thresholds
from pruners.model.uncut import Uncut
from pruners.model.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Step:
    """One method and its thresholds; a step without a positive share does nothing."""

    pruner: Pruner
    thresholds: Thresholds = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether the step cuts anything."""
        return any(share > 0.0 for share in self.thresholds.values())

    def describe(self) -> str:
        """Say per kind of site the mean share that is cut, and the range where it varies."""
        kinds: dict[str, list[float]] = {}
        for site, share in self.thresholds.items():
            kinds.setdefault(
                "weight" if self.pruner.family == "weight" else site.rpartition(".")[2], []
            ).append(share)
        return f"{self.pruner.name}: " + ", ".join(
            f"{k if k == WIDTH else f'{k}s'} -{_percent(shares)}" for k, shares in kinds.items()
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in the order unit (surgery), token (flow), weight (masks on what is left)."""

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        """Check the order of the families.

        Raises:
            ValueError: If the steps stand in another order, or if two of them are token steps.
        """
        families = [step.pruner.family for step in self.steps]
        if families != sorted(families, key=FAMILIES.index):
            names = " -> ".join(f"{step.pruner.name} ({step.pruner.family})" for step in self.steps)
            raise ValueError(f"steps are {names}; give them in the order {', '.join(FAMILIES)}")
        if families.count("token") > 1:
            raise ValueError(
                f"steps hold {families.count('token')} token methods; give one at most"
            )

    def shape(self, dense: ViTShape) -> ViTShape:
        """Return the shape that the plan makes of a shape. Pure.

        Raises:
            ValueError: If a threshold does not fit, or units or tokens would be cut after weights
                were masked.
        """
        shape = dense
        for step in self._active():
            # Behind a unit step heads may be padded with masked weights, which tokens do not mind.
            _refuse_late(step, dense if step.pruner.family == "token" else shape)
            shape = step.pruner.shrink(shape, step.thresholds)
        return shape

    def apply(
        self,
        vit: ViT,
        batches: Batches = (),
        learned: Learned | None = None,
    ) -> None:
        """Cut a model in place.

        Args:
            vit: The model.
            batches: Calibration batches, iterated anew by each step that scores, and to compensate
                what a unit step leaves: with the tokens that really flow, if a token step follows.
            learned: What the first step that cuts knows of this model already: its scores, and
                weights where it learned them too. Every other step scores the network as it is
                when it comes.

        Raises:
            ValueError: As `shape` does.
        """
        self.shape(vit.shape())  # refuses what cannot be, before anything is cut
        uncut: Uncut | None = None
        for position, step in enumerate(self._active()):
            pruner = step.pruner
            thresholds = pruner.ramped(step.thresholds, 0)
            target = pruner.shrink(vit.shape(), thresholds)
            known = learned if position == 0 else None
            if uncut is not None and pruner.family != "token":
                compensate(vit, uncut, batches)
                uncut = None
            if isinstance(pruner, UnitPruner):
                uncut = _cut_units(pruner, vit, batches, known, thresholds)
            elif known is not None:
                pruner.cut(vit, known.scores, thresholds)
            else:
                pruner.prune(vit, batches, thresholds)
            if vit.shape() != target:
                raise AssertionError(f"{step.describe()} made another shape than it predicted")
        if uncut is not None:
            compensate(vit, uncut, batches)

    def ramp(self, vit: ViT, batches: Batches, epoch: int) -> None:
        """Cut further before fine-tuning epoch 1, 2, ..., where a step is ramped over epochs."""
        for step in self._active():
            before = step.pruner.ramped(step.thresholds, epoch - 1)
            thresholds = step.pruner.ramped(step.thresholds, epoch)
            if thresholds != before:
                step.pruner.prune(vit, batches, thresholds)

    def describe(self) -> str:
        """Say the plan in one line."""
        return "; ".join(step.describe() for step in self._active()) or "dense"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "steps": [
                {
                    "method": s.pruner.name,
                    "options": s.pruner.options(),
                    "thresholds": dict(s.thresholds),
                }
                for s in self.steps
            ]
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If a key is missing, a method or an option unknown, or a share no number.
        """
        try:
            steps = [
                Step(pruner=load_method(s["method"], **s["options"]), thresholds=s["thresholds"])
                for s in values["steps"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"plan lacks {error}; give what Plan.to_json writes") from error
        for step in steps:
            shares = step.thresholds
            if not isinstance(shares, dict) or any(
                type(share) not in (int, float) for share in shares.values()
            ):
                raise ValueError(f"thresholds of {step.pruner.name} are {shares!r}; give shares")
        return cls(steps=tuple(steps))

    def _active(self) -> list[Step]:
        return [step for step in self.steps if step.active]


def _cut_units(
    pruner: UnitPruner, vit: ViT, batches: Batches, known: Learned | None, thresholds: Thresholds
) -> Uncut | None:
    """Cut units in place; return what the model was, if what stays is to be compensated."""
    if known is None:
        return pruner.cut_anew(vit, batches, thresholds)
    if isinstance(pruner, LearnedPruner):
        return pruner.cut_known(vit, batches, known, thresholds)
    return pruner.cut_scored(vit, batches, known.scores, thresholds)


def _refuse_late(step: Step, shape: ViTShape) -> None:
    """Refuse to cut units or tokens after a later family: costs and scores would be wrong."""
    if step.pruner.family != "weight" and (shape.nonzero or shape.reduced):
        earlier = "masked weights" if shape.nonzero else "reduced tokens"
        raise ValueError(
            f"step {step.pruner.name} cuts {step.pruner.family}s of a model with {earlier}; "
            "cut them first"
        )


def _percent(shares: Sequence[float]) -> str:
    low, high = 100 * min(shares), 100 * max(shares)
    mean = f"{100 * fmean(shares):.0f} %"
    return mean if high - low < 1.0 else f"{mean} ({low:.0f} to {high:.0f})"
