"""Masks of units per class: how they learn, shrink to a share of the cost, and stay even.

The curvature of the loss along a mask value is taken to be the mean square of its slope (empirical
Fisher, diagonal), that of a batch's mean slope times the batch's size. A unit of several values, a
head with one per dim, has one curvature, that along all of them together: it goes as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEMORY = 0.25
"""Share of a run that the mean square of a slope remembers."""
DAMPING = 0.05
"""What is added to each curvature, as a share of the site's mean: some batches know it badly."""
RESOLUTION = 6.0
"""Times 1 / images: curvature added to a Newton step. Noise then moves a mask by 0.2 at most."""
TINY = torch.finfo(torch.float32).tiny
ITERATIONS = 8
"""Of the search for the pull, which end at it: the share falls little from step to step."""


class ClassMasks(nn.Module):
    """A mask value per class and unit, or per class and dim of a unit, for some sites.

    Attributes:
        values: Per site [C, units * dims], 1 at first.
        squares: Per site [C, units], the mean square of an image's slope along a unit.
        seen: [], steps so far.
        dims: Per site the values that a unit has.
    """

    seen: Tensor

    def __init__(
        self, classes: int, units: Sequence[int], dims: Sequence[int], device: torch.device
    ) -> None:
        """Start with ones."""
        super().__init__()
        self.dims = list(dims)
        self.values = nn.ParameterList(
            torch.ones(classes, count * width, device=device)
            for count, width in zip(units, dims, strict=True)
        )
        self.squares = nn.ParameterList(
            nn.Parameter(torch.zeros(classes, count, device=device), requires_grad=False)
            for count in units
        )
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # read without waiting

    @torch.no_grad()
    def observe(self, slopes: Sequence[Tensor], images: int, steps: float) -> None:
        """Average in the squares of slopes.

        Args:
            slopes: Of a batch's mean loss, [C, units * dims] of each site.
            images: Of the batch.
            steps: Batches of the whole run.
        """
        self.seen += 1
        weight = max(min(1.0, 1.0 / (MEMORY * steps)), 1.0 / int(self.seen))
        for square, slope, width in zip(self.squares, slopes, self.dims, strict=True):
            square.lerp_(images * slope.unflatten(1, (-1, width)).sum(2).square(), weight)

    def curvatures(self) -> list[Tensor]:
        """Return the damped curvature along each unit, [C, units] of each site; all above 0."""
        return [s + (DAMPING * s.mean()).clamp_min(TINY) for s in self.squares]

    @torch.no_grad()
    def uneven_slopes(self, slopes: Sequence[Tensor], over: str) -> list[Tensor]:
        """Return the slopes of the masks' unevenness, in root mean squares of those of the loss.

        Args:
            slopes: Of the loss, [C, units * dims] of each site.
            over: See `uneven_slope`.
        """
        found = []
        for mask, slope, width in zip(self.values, slopes, self.dims, strict=True):
            run = width if width > 1 else mask.shape[1]
            found.append(slope.square().mean().sqrt() * uneven_slope(mask, run, over))
        return found

    @torch.no_grad()
    def descend(self, slopes: Sequence[Tensor], newton: float, batch: int, steps: int) -> None:
        """Go down the slopes by a step of a run; no mask falls below 0, where its unit is gone.

        Args:
            slopes: Of a batch's mean loss, [C, units * dims] of each site.
            newton: Newton steps that the whole run is long.
            batch: Images of the batch.
            steps: Batches of the run. Its images tell a slope from noise where the curvature is
                some times 1 / images or more; other masks hardly move.
        """
        lost = RESOLUTION / (batch * steps)
        for mask, slope, square, width in zip(
            self.values, slopes, self.squares, self.dims, strict=True
        ):
            metric = (square + lost).clamp_min(TINY).repeat_interleave(width, 1)
            mask -= newton / steps * width * slope / metric
            mask.clamp_(min=0.0)

    @torch.no_grad()
    def shrink(self, costs: Sequence[float], share: float) -> None:
        """Shrink the masks until their mean cost is at most a share of that of ones.

        Args:
            costs: Of each site with all its units.
            share: Of the costs' sum.
        """
        weights = [
            cost / sum(costs) / mask.numel() for cost, mask in zip(costs, self.values, strict=True)
        ]
        rates = [
            (w * width / curvature).repeat_interleave(width, 1)
            for w, curvature, width in zip(weights, self.curvatures(), self.dims, strict=True)
        ]
        pull = pull_to(list(self.values), rates, weights, share)
        for mask, rate in zip(self.values, rates, strict=True):
            mask /= 1.0 + pull * rate


def pull_to(
    masks: Sequence[Tensor], rates: Sequence[Tensor], weights: Sequence[float], share: float
) -> Tensor:
    """Return the nu >= 0 for which sum over sites of w sum M / (1 + nu r) is `share`; [].

    M / (1 + nu w / H) is the proximal step of nu w M^2 / 2, the L2 penalty, where the loss has the
    curvature H. The sum falls in nu and is convex, so Newton's method from 0 never goes too far.

    Args:
        masks: M, [C, values] of each site.
        rates: r = w / H, [C, values] of each site.
        weights: w, of a value of each site.
        share: Of what ones would sum up to, 1.
    """
    pull = rates[0].new_zeros(())
    for _ in range(ITERATIONS):
        left, slope = torch.zeros_like(pull), torch.zeros_like(pull)
        for mask, rate, weight in zip(masks, rates, weights, strict=True):
            shrunk = mask / (1.0 + pull * rate)
            left += weight * shrunk.sum()
            slope += weight * (shrunk * rate / (1.0 + pull * rate)).sum()
        pull = pull + (left - share).clamp_min(0.0) / slope
    return pull


def falling(progress: float, start: float, end: float, share: float) -> float:
    """Return 1 until `start` of a run, `share` from `end` on, and a straight line between."""
    return 1.0 - (1.0 - share) * min(1.0, max(0.0, progress - start) / (end - start))


def uneven_slope(mask: Tensor, run: int, over: str) -> Tensor:
    """Return the slope of the summed |`second_difference`| of a mask [C, values] (eq. 6); like it.

    Args:
        mask: [C, values].
        run: Values that follow on each other; a head's last dim has no neighbour in the next head.
        over: "units" or "classes", along which to difference.
    """
    x = mask.unflatten(1, (-1, run)) if over == "units" else mask.t()  # [..., n]
    if x.shape[-1] < 3:
        return torch.zeros_like(mask)
    signs = second_difference(x).sign()  # [..., n - 2]
    slope = second_difference(F.pad(signs, (2, 2)))  # the transpose of a symmetric stencil
    return slope.flatten(1) if over == "units" else slope.t()


def second_difference(x: Tensor) -> Tensor:
    """Return x[i-1] - 2 x[i] + x[i+1] along the last dim of x [..., n]; [..., n - 2]."""
    return x[..., :-2] - 2.0 * x[..., 1:-1] + x[..., 2:]
