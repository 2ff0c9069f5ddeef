"""Unit methods whose scores are learned: once, then cut as often as wanted."""

from __future__ import annotations

import abc
import copy
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruners.families.allocation import common_cutoff
from pruners.families.options import LARGEST_SEED, option
from pruners.families.unit import UnitPruner
from pruners.model.cost import cost_of
from pruners.model.files import load_weights, write_tensors
from pruners.model.shape import ViTShape
from pruners.model.sites import block_of, block_site, kind_of
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.uncut import Uncut
from pruners.model.vit import ViT
from pruners.training.learner import Learner, LearningData, run

_NOT_A_REPORT = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a method learned of a network.

    Attributes:
        scores: Site -> margins of its units: how far each lies above the site's learned threshold.
        weights: The model's tensors as they were trained together with the scores; empty where the
            method trains none, or where they are not kept.
        by_class: Site -> how much each class needs each unit, [classes, units], where the method
            learns that.
        report: Figures of the run, by name; `seconds` is always there.
    """

    scores: Scores
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    by_class: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a safetensors file, under a temporary name first."""
        tensors = {f"scores.{site}": t for site, t in self.scores.items()}
        tensors |= {f"weights.{name}": t for name, t in self.weights.items()}
        tensors |= {f"by_class.{site}": t for site, t in self.by_class.items()}
        tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        metadata = {"report": json.dumps(dict(self.report))}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Learned:
        """Read what `save` wrote.

        Raises:
            ValueError: If it is no such file.
        """
        found: dict[str, dict[str, Tensor]] = {"scores": {}, "weights": {}, "by_class": {}}
        try:
            with safe_open(path, framework="pt") as file:
                report = {key: float(v) for key, v in json.loads(file.metadata()["report"]).items()}
                for key in file.keys():  # noqa: SIM118
                    kind, _, name = key.partition(".")
                    found[kind][name] = file.get_tensor(key)
        except (SafetensorError, *_NOT_A_REPORT) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not hold learned scores ({reason})") from error
        if "seconds" not in report:
            raise ValueError(f"{path} does not hold learned scores (its report lacks 'seconds')")
        for site, scores in found["scores"].items():
            if not scores.is_floating_point() or scores.dim() not in (1, 2):
                raise ValueError(
                    f"{path}: scores of {site!r} are {scores.dtype} of shape "
                    f"{tuple(scores.shape)}; give floats, per unit or per weight"
                )
        for site, masks in found["by_class"].items():
            if not masks.is_floating_point() or masks.dim() != 2:
                raise ValueError(
                    f"{path}: by_class of {site!r} is {masks.dtype} of shape "
                    f"{tuple(masks.shape)}; give floats, [classes, units]"
                )
        return cls(**found, report=report)


class UnitLearner(Learner, abc.ABC):
    """The learning run of a method, which says in the end what was learned."""

    @abc.abstractmethod
    def conclude(self, data: LearningData) -> Learned:
        """Return what was learned. The run is over then: the model may lose its gates."""


@dataclass(frozen=True, kw_only=True)
class LearnedPruner(UnitPruner, abc.ABC):
    """A unit method that learns.

    The score of a unit is its margin above the threshold that was learned for its site. So the
    paper's own layer-wise shares are those of the cutoff 0, and `allocate` moves one common cutoff
    until a budget is met: the repair that makes a learned budget exact, and the way to budgets
    nearby. A method that learns for a budget has the option `budget`.

    Attributes:
        epochs: Epochs in which weights, scores and thresholds are learned.
        lr: Learning rate of the weights.
        keep_weights: Whether a cut starts from the weights that were trained with the scores.
        seed: Seed of the run.
    """

    whole_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of which `allocate` may take a site's last unit too."""

    epochs: int = option(4, low=1)
    lr: float = option(5e-4, above=0.0)
    keep_weights: bool = True
    seed: int = option(0, low=0, high=LARGEST_SEED)

    @abc.abstractmethod
    def learner(self, vit: ViT, data: LearningData) -> UnitLearner:
        """Start a run on a model that is the run's own."""

    def learns_for_a_budget(self) -> bool:
        """Whether another budget needs another run."""
        return hasattr(self, "budget")

    def for_budget(self, budget: float) -> Self:
        """Return the method that learns for a share of the dense cost; itself if any run will do.

        Raises:
            ValueError: If it is no share.
        """
        other: dict[str, Any] = {"budget": budget} if self.learns_for_a_budget() else {}
        return dataclasses.replace(self, **other)

    def total_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.epochs

    def learn(self, vit: ViT, data: LearningData, checkpoint: Path | None = None) -> Learned:
        """Learn. `vit` is left as it was.

        Args:
            vit: The model to prune.
            data: Images.
            checkpoint: File from which an interrupted run goes on.
        """
        start = time.perf_counter()
        own = copy.deepcopy(vit).requires_grad_(True)
        own.use_fused_attention(next(own.parameters()).is_cuda)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            learner = self.learner(own, data)
            run(learner, data, self.total_epochs(), self.seed, checkpoint)
            learned = learner.conclude(data)
        seconds = time.perf_counter() - start
        return Learned(
            scores={site: s.detach().float().cpu() for site, s in learned.scores.items()},
            weights=learned.weights if self.keep_weights else {},
            by_class=learned.by_class,
            report={**learned.report, "seconds": seconds},
        )

    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Learn on the batches, the same in every epoch, and return the scores alone."""
        return self.learn(vit, LearningData.of(batches)).scores

    def cut_anew(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> Uncut | None:
        """Learn, then do what `cut_known` does."""
        return self.cut_known(vit, batches, self.learn(vit, LearningData.of(batches)), thresholds)

    def cut_known(
        self, vit: ViT, batches: Batches, learned: Learned, thresholds: Thresholds
    ) -> Uncut | None:
        """Take over what was learned of a model, then do what `cut_scored` does.

        What stays is to be compensated toward the model as it came, not toward all that learned
        weights would be with no unit gone: they were trained with units masked.
        """
        dense = copy.deepcopy(vit) if self.compensate and learned.weights else None
        self.take_over(vit, learned, thresholds)
        uncut = self.cut_scored(vit, batches, learned.scores, thresholds)
        return None if uncut is None else dataclasses.replace(uncut, aim=dense)

    def take_over(self, vit: ViT, learned: Learned, thresholds: Thresholds) -> None:
        """Give a model the learned weights, if they are kept, before it is cut."""
        if learned.weights:
            load_weights(vit.vit, learned.weights, source=f"what {self.name} learned")

    def cut_learned(self, vit: ViT, learned: Learned, thresholds: Thresholds) -> None:
        """Take over the learned weights and cut in place; what stays is not compensated."""
        self.take_over(vit, learned, thresholds)
        self.cut(vit, learned.scores, thresholds)

    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Remove the blocks that are not worth it, then move all thresholds by one common offset.

        Blocks with a negative margin go, lowest first, as long as what is left costs the budget or
        more; further ones only if the budget is out of reach otherwise.
        """
        margins = {s: m if m.dim() == 1 else m.mean(dim=0) for s, m in scores.items()}
        blocks = {s: m.item() for s, m in margins.items() if kind_of(s) == "block"}
        gone: dict[str, float] = {}
        candidates = sorted(blocks, key=blocks.__getitem__)
        while candidates and blocks[candidates[0]] < 0.0:
            shape_left = self.shrink(shape, {**gone, candidates[0]: 1.0})
            if cost_of(shape_left).effective_macs < macs:
                break
            gone[candidates.pop(0)] = 1.0
        while True:
            try:
                return gone | self._offset(shape, margins, gone, macs)
            except ValueError:
                if len(candidates) < 2:
                    raise
                gone[candidates.pop(0)] = 1.0

    def _offset(
        self, shape: ViTShape, margins: Scores, gone: Thresholds, macs: float
    ) -> dict[str, float]:
        """Find the common offset of the thresholds of what stands in the blocks that stay.

        Raises:
            ValueError: If no offset meets the budget.
        """
        left = {
            site: margin
            for site, margin in margins.items()
            if kind_of(site) != "block" and block_site(block_of(site)) not in gone
        }
        whole = [site for site in left if kind_of(site) in self.whole_kinds]
        return common_cutoff(
            left, lambda shares: self.shrink(shape, {**gone, **shares}), macs, whole
        )


def model_tensors(vit: ViT) -> dict[str, Tensor]:
    """Return name -> copy of each of a model's tensors, [...], on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in vit.vit.state_dict().items()}


def places(importance: Scores, costs: Mapping[str, float]) -> Scores:
    """Return site -> [units], the cost of all units of less importance, and half of the unit's own.

    So a threshold that is the same everywhere removes its own value of the cost.

    Args:
        importance: Site -> [units].
        costs: Site -> cost of all its units together.
    """
    flat, own = _by_unit(importance, costs)
    order = flat.argsort(stable=True)
    lower = torch.empty_like(own)
    lower[order] = own[order].cumsum(0) - own[order] / 2
    counts = [len(scores) for scores in importance.values()]
    return dict(zip(importance, lower.split(counts), strict=True))


@torch.no_grad()
def cutoff(scores: Scores, costs: Mapping[str, float], share: float) -> Tensor:
    """Return a score, []: below it lie just so many units that they cost a share, or more.

    As `allocate` does, which then cuts the units that were trained without, and no more.

    Args:
        scores: Site -> [units].
        costs: Site -> cost of all its units together.
        share: In the unit of the costs.
    """
    flat, own = _by_unit(scores, costs)
    ascending, order = flat.sort(stable=True)
    below = torch.cat([own.new_zeros(1), own[order].cumsum(0)])  # of 0, 1, ... units
    count = torch.searchsorted(below, share * (1.0 - 1e-6)).clamp(max=len(flat))
    ends = torch.cat([ascending[:1] - 1.0, ascending, ascending[-1:] + 1.0])
    return (ends[count] + ends[count + 1]) / 2.0


def _by_unit(scores: Scores, costs: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return all units' scores and costs, [units of all sites] each."""
    own = [s.new_full((len(s),), costs[site] / len(s)) for site, s in scores.items()]
    return torch.cat(list(scores.values())), torch.cat(own)
