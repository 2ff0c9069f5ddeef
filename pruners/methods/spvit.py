"""SPViT: soft token pruning, with packages for what is dropped (Z. Kong et al., 2022, 2112.13890).

Per image the uninformative patches of a stage are fused into one more token, the package, that
stays to the end.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pruners.families.selector import SelectorPruner
from pruners.families.token import remove_reducers
from pruners.latency.phases import Keeps, Rules, search_phases, shares_of
from pruners.latency.table import LatencyTable, measure_latency
from pruners.model.policy import draw_keeps
from pruners.model.shape import ViTShape
from pruners.model.soft_tokens import (
    HeadwiseClassifier,
    Scores,
    classifier_heads,
    log_odds,
    package,
)
from pruners.model.tokens import FrontReducer, TokenReducer, Tokens, split_by_score, take_tokens
from pruners.model.types import Thresholds
from pruners.model.vit import ViT
from pruners.plan import Step
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.learner import LearningData
from pruners.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SPViT(SelectorPruner):
    """Scores patches with one small classifier per head, and packs those that do not go on.

    The kept share is held at its target over the batch, so images may keep more or fewer patches in
    training. Afterwards the same number of patches goes on in every image, the ones that score
    highest: batches stay rectangular, and the cost follows from the plan. (So the authors answered;
    their published code only masks, and draws at random even then.)

    Heads are those of the block that has most, or the next fewer that the channels can be split
    over (`classifier_heads`). Departures from the released code: each head has a classifier of its
    own; a package is a mean, not a sum; selectors start at the share that they are to keep, not at
    one half, for short fine-tunings would end far from it.

    Attributes:
        normalise_package: Whether a package is the weighted mean of its patches; otherwise their
            weighted sum.
    """

    per_image: ClassVar[bool] = False
    least_dropped: ClassVar[int] = 2  # one package for one patch shortens nothing

    normalise_package: bool = True

    def reducers(self, shape: ViTShape, thresholds: Thresholds) -> dict[int, TokenReducer]:
        """Return a selector in front of each block that drops enough.

        Raises:
            ValueError: If the width cannot be split over heads.
        """
        counts = self.counts(shape, thresholds)
        before = [shape.patches, *counts.values()]
        return {
            block: Selector(
                shape,
                kept=kept,
                share=kept / before[packages],
                packages=packages,
                normalise_package=self.normalise_package,
            )
            for packages, (block, kept) in enumerate(counts.items())
        }

    def latency_table(
        self, vit: ViT, *, batch: int = 1, rounds: int = 20, rules: Rules | None = None
    ) -> LatencyTable:
        """Measure a model on the device that it is on, at the token counts of a search's grid."""
        shape, ratios = vit.shape(), (rules or Rules()).grid
        kept = [max(1, math.floor(ratio * shape.patches + 1e-9)) for ratio in ratios]
        selector = Selector(
            shape, kept=kept[-1], share=0.5, packages=0, normalise_package=self.normalise_package
        )
        full = shape.prefix_tokens + shape.patches
        counts = [full, *(min(full, shape.prefix_tokens + n + 1) for n in kept[1:])]
        return measure_latency(vit, selector, counts, batch=batch, rounds=rounds)

    def placed(self, keeps: Keeps) -> Step:
        """Return the plan's step with selectors in front of these blocks.

        Args:
            keeps: Block -> share of all patches that goes on from there.
        """
        return Step(
            pruner=dataclasses.replace(self, blocks=tuple(sorted(keeps))),
            thresholds={f"blocks.{b}.token": share for b, share in shares_of(keeps).items()},
        )

    def schedule(
        self,
        vit: ViT,
        data: LearningData,
        table: LatencyTable,
        limit_s: float,
        *,
        recipe: Recipe | None = None,
        rules: Rules | None = None,
        seed: int = 0,
    ) -> Scheduled:
        """Search where selectors stand and what they keep, so that a latency limit is met.

        The paper's latency-aware layer-to-phase training, as a reconstruction: the released code
        holds nothing of it, and the paper's section was known from memory only. Every schedule that
        is tried goes on with the weights of the last one that was accepted, is fine-tuned with
        `vit` as teacher, and is judged on `data.val`. The option `blocks` is not looked at.

        Args:
            vit: The dense model, or one that lost units; left as it was.
            data: Images; every trial trains on further epochs of them.
            table: Latency of the model on the target device.
            limit_s: Seconds per image.
            recipe: How each trial is fine-tuned; by default one epoch.
            rules: Grid, tolerance and merging.
            seed: Every random number depends on it alone.

        Raises:
            ValueError: If the limit is out of reach.
        """
        shape, recipe, rules = vit.shape(), recipe or Recipe(epochs=1), rules or Rules()
        teacher = copy.deepcopy(vit).eval()
        epochs = 0

        def tune(state: ViT, keeps: Keeps) -> tuple[ViT, float]:
            nonlocal epochs
            torch.manual_seed(seed * 1_009 + epochs)
            student = with_selectors(state, self.placed(keeps))
            tuner = FineTuner(student, recipe, data.steps, teacher)
            for _ in range(recipe.epochs):
                tuner.train_epoch(data.train(epochs))
                epochs += 1
            return student, evaluate(student, data.val()).top1

        def latency(keeps: Keeps) -> float:
            step = self.placed(keeps)
            return table.latency_of(step.pruner.shrink(shape, step.thresholds))

        found = search_phases(
            copy.deepcopy(vit),
            depth=len(shape.blocks),
            limit=limit_s,
            latency=latency,
            tune=tune,
            rules=rules,
        )
        return Scheduled(
            step=self.placed(found.keeps),
            seconds=found.seconds,
            top1=found.accuracy,
            vit=found.state.eval(),
            epochs=epochs,
        )


class Scheduled(NamedTuple):
    """What a schedule search found.

    Attributes:
        step: The plan's step, whose option `blocks` says where selectors stand.
        seconds: Latency per image that the table says.
        top1: Of `vit` on the validation images, in percent.
        vit: The model as it was trained during the search, selectors included.
        epochs: Epochs that the search trained for.
    """

    step: Step
    seconds: float
    top1: float
    vit: ViT
    epochs: int


def with_selectors(vit: ViT, step: Step) -> ViT:
    """Return a copy that has the selectors of a step instead of its own, trained ones kept."""
    new = copy.deepcopy(vit)
    remove_reducers(new)
    step.pruner.cut(new, {}, step.thresholds)
    for block, old in zip(new.blocks, vit.blocks, strict=True):
        if isinstance(block.front, Selector) and isinstance(old.front, Selector):
            block.front.take_over(old.front)
    return new


class Selector(FrontReducer):
    """Keeps patches that its classifier scores highest, and appends a package of the others.

    In training dropped patches stay where they are, hidden by the policy; afterwards they are gone.
    The packages of earlier selectors always stay, behind the patches.
    """

    starts_untrained = True

    def __init__(
        self, shape: ViTShape, *, kept: int, share: float, packages: int, normalise_package: bool
    ) -> None:
        """Prepare.

        Args:
            shape: The model's.
            kept: Patches that go on.
            share: The share of the arriving patches that these are; the classifier starts there.
            packages: Packages that arrive behind the patches.
            normalise_package: See `SPViT`.
        """
        super().__init__()
        self.prefix_tokens, self.dim = shape.prefix_tokens, shape.dim
        self.kept, self.share, self.packages = kept, share, packages
        self.normalise_package = normalise_package
        heads = classifier_heads(shape.dim, max(block.heads for block in shape.blocks))
        self.classifier = HeadwiseClassifier(shape.dim, heads, share)

    def tokens_after(self, tokens: int) -> int:
        """Prefix, kept patches, earlier packages and the new one."""
        return self.prefix_tokens + self.kept + self.packages + 1

    def macs(self, tokens: int) -> int:
        """Count the classifier on patches and packages, and the weighted sum of a package."""
        scored = tokens - self.prefix_tokens
        dropped = scored - self.packages - self.kept
        return self.classifier.macs(scored) + dropped * self.dim

    def forward(self, tokens: Tokens) -> Tokens:
        """Mask with a drawn decision in training; otherwise keep the patches of highest score."""
        scores = self.score(tokens)
        patches = tokens.x.shape[1] - self.prefix_tokens - self.packages
        keep, logits = scores.keep[:, :patches], scores.logits[:, :patches]
        if self.training:
            return self.mask(tokens, keep, draw_keeps(logits))
        return self.gather(tokens, keep, *split_by_score(keep, self.kept))

    def score(self, tokens: Tokens) -> Scores:
        """Score patches and packages, [B, N - prefix]; dropped tokens do not count."""
        body = tokens.x[:, self.prefix_tokens :]
        policy = tokens.policy
        present = (
            torch.ones_like(body[..., 0]) if policy is None else policy[:, self.prefix_tokens :]
        )
        return self.classifier(body, present)

    def mask(self, tokens: Tokens, keep: Tensor, decision: Tensor) -> Tokens:
        """Hide patches and append a package of those that are dropped now.

        Args:
            tokens: The tokens that arrive.
            keep: [B, patches], probability of keeping.
            decision: [B, patches], 1 for patches that go on, as far as they arrive.
        """
        x, start = tokens.x, self.prefix_tokens
        patches = slice(start, start + decision.shape[1])
        before = torch.ones_like(decision) if tokens.policy is None else tokens.policy[:, patches]
        decision = decision * before
        new = package(x[:, patches], keep * (before - decision), normalise=self.normalise_package)
        prefix = decision.new_ones(len(x), start)
        packages = decision.new_ones(len(x), self.packages + 1)
        return tokens._replace(
            x=torch.cat([x, new.to(x.dtype)], dim=1),
            policy=torch.cat([prefix, decision, packages], dim=1),
            decisions=(*tokens.decisions, decision),
        )

    def gather(self, tokens: Tokens, keep: Tensor, kept: Tensor, dropped: Tensor) -> Tokens:
        """Take prefix, kept patches, earlier packages and a new one of the dropped patches.

        Args:
            tokens: The tokens that arrive.
            keep: [B, patches], probability of keeping.
            kept: [B, K], patches that go on.
            dropped: [B, patches - K], the others.
        """
        x, first = tokens.x, self.prefix_tokens
        prefix, packages = x[:, :first], x[:, first + keep.shape[1] :]
        weight = keep.gather(1, dropped)
        new = package(take_tokens(x, first + dropped), weight, normalise=self.normalise_package)
        patches = take_tokens(x, first + kept)
        return tokens._replace(x=torch.cat([prefix, patches, packages, new.to(x.dtype)], dim=1))

    @torch.no_grad()
    def take_over(self, other: Selector) -> None:
        """Take over what a selector learned, moved to the share that this one is to keep."""
        self.load_state_dict(other.state_dict())
        self.classifier.shift(log_odds(self.share) - log_odds(other.share))
