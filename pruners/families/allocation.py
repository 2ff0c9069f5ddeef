"""Layer-wise thresholds for a MACs budget: a global ranking, or one share for all sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from pruners.model.cost import cost_of
from pruners.model.shape import ViTShape
from pruners.model.sites import WIDTH


def rank_globally(
    shape: ViTShape,
    step_scores: dict[str, Tensor],
    shrink: Callable[[dict[str, float]], ViTShape],
    macs: float,
    floors: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Cut, over all sites together, what scores lowest per effective MAC that its removal saves.

    Args:
        shape: Shape before the cut.
        step_scores: Site -> [n] scores of removing a first, second, ... unit, ascending. The last
            one always stays.
        shrink: Thresholds -> shape after the cut.
        macs: Effective MACs to reach.
        floors: Site -> number of units that stay at least; 1 where a site is absent.

    Returns:
        Site -> share. The cut is the smallest of the ranking that meets the budget.

    Raises:
        ValueError: If even the largest cut is above the budget.
    """
    base = cost_of(shape).effective_macs
    per_mac: dict[str, Tensor] = {}
    for site, scores in step_scores.items():
        units = scores.numel()
        removable = units - max(1, (floors or {}).get(site, 1))
        if removable > 0:
            probe = max(1, units // 8)  # a unit alone may round to nothing in a rounding shrink
            saved = (base - cost_of(shrink({site: probe / units})).effective_macs) / probe
            per_mac[site] = scores[:removable].double().contiguous() / max(saved, 1e-12)
    if not per_mac:
        raise ValueError("nothing is left to cut; give a larger budget")
    return _lowest(per_mac, {s: v.numel() for s, v in step_scores.items()}, shrink, macs)


def common_cutoff(
    margins: dict[str, Tensor],
    shrink: Callable[[dict[str, float]], ViTShape],
    macs: float,
    whole: Collection[str] = (),
) -> dict[str, float]:
    """Cut, over all sites together, every unit whose margin lies below one common cutoff.

    The last unit of a site stays, unless it is one of the sites `whole`.

    Args:
        margins: Site -> [n], how far each unit lies above its site's own threshold.
        shrink: Thresholds -> shape after the cut.
        macs: Effective MACs to reach.
        whole: Sites that may go as a whole.

    Returns:
        Site -> share, for the lowest cutoff that meets the budget.

    Raises:
        ValueError: If even the largest cut is above the budget.
    """
    removable = {}
    for site, margin in margins.items():
        ascending = margin.double().sort().values
        removable[site] = (ascending if site in whole else ascending[:-1]).contiguous()
    return _lowest(removable, {s: m.numel() for s, m in margins.items()}, shrink, macs)


def _lowest(
    removable: dict[str, Tensor],
    units: dict[str, int],
    shrink: Callable[[dict[str, float]], ViTShape],
    macs: float,
) -> dict[str, float]:
    """Cut the smallest number of lowest values, over all sites together, that meets a budget.

    Args:
        removable: Site -> ascending values of the units that may go.
        units: Site -> number of all its units.
        shrink: Thresholds -> shape after the cut.
        macs: Effective MACs to reach.
    """
    ranking = torch.sort(torch.cat(list(removable.values()) or [torch.empty(0)])).values

    def shares(count: int) -> dict[str, float]:
        if count == 0:
            return dict.fromkeys(units, 0.0)
        cutoff = ranking[count - 1]
        cuts = {s: torch.searchsorted(v, cutoff, right=True).item() for s, v in removable.items()}
        return {site: cuts.get(site, 0) / n for site, n in units.items()}

    count = smallest(ranking.numel(), lambda n: cost_of(shrink(shares(n))).effective_macs <= macs)
    if count is None:
        raise out_of_reach(macs, shrink(shares(ranking.numel())))
    return shares(count)


def rank_with_width(
    shape: ViTShape,
    step_scores: dict[str, Tensor],
    shrink: Callable[[ViTShape, dict[str, float]], ViTShape],
    macs: float,
) -> dict[str, float]:
    """Cut channels and other units so that both lose the same share of all their scores.

    Scores of a channel and of a head or a neuron do not compare (isomorphic pruning, Fang et al.,
    2024, arXiv:2407.04616). So channels are ranked among themselves, the others as `rank_globally`
    does, and what each kind loses is counted in its own scores. A stream in which much is in few
    channels so becomes narrow, and one in which each channel counts alike stays wide.

    Args:
        shape: Shape before the cut.
        step_scores: Site -> [n] scores of removing a first, second, ... unit, ascending; the
            width's among them.
        shrink: Shape, thresholds -> shape after the cut.
        macs: Effective MACs to reach.

    Returns:
        Site -> share.

    Raises:
        ValueError: If even the largest cut is above the budget.
    """
    others = {site: scores for site, scores in step_scores.items() if site != WIDTH}

    def lost(shares: Mapping[str, float]) -> float:
        """Share of the scores of these sites that goes with their shares."""
        cut = [step_scores[s][: round(x * len(step_scores[s]))].sum() for s, x in shares.items()]
        total = sum(step_scores[site].sum().item() for site in shares)
        return sum(part.item() for part in cut) / total if total > 0.0 else 0.0

    def width(channels: int) -> dict[str, float]:
        return {WIDTH: channels / shape.dim}

    def rest(channels: int) -> dict[str, float] | None:
        left = shrink(shape, width(channels))
        if cost_of(left).effective_macs <= macs:
            return dict.fromkeys(others, 0.0)
        try:
            return rank_globally(left, others, lambda shares: shrink(left, shares), macs)
        except ValueError:  # the others get no further
            return None

    def balanced(channels: int) -> bool:
        shares = rest(channels)
        return shares is not None and lost(width(channels)) >= lost(shares)

    channels = smallest(shape.dim - 1, balanced)
    if channels is None:
        least = {site: (len(scores) - 1) / len(scores) for site, scores in step_scores.items()}
        raise out_of_reach(macs, shrink(shape, least))
    return width(channels) | (rest(channels) or {})


def same_share(
    sites: list[str], shrink: Callable[[dict[str, float]], ViTShape], macs: float, largest: float
) -> dict[str, float]:
    """Give every site the same share, the smallest that meets a budget of effective MACs.

    Shares are tried on a grid of `largest` / 4096.

    Raises:
        ValueError: If even the share `largest` is above the budget.
    """
    steps = 4096

    def shares(step: int) -> dict[str, float]:
        return dict.fromkeys(sites, largest * step / steps)

    step = smallest(steps, lambda n: cost_of(shrink(shares(n))).effective_macs <= macs)
    if step is None:
        raise out_of_reach(macs, shrink(shares(steps)))
    return shares(step)


def smallest(largest: int, holds: Callable[[int], bool]) -> int | None:
    """Return the smallest n in 0..largest for which a monotone predicate holds, or None."""
    if not holds(largest):
        return None
    low, high = 0, largest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def out_of_reach(macs: float, smallest_shape: ViTShape) -> ValueError:
    """Return the error of a budget of effective MACs below the smallest shape's."""
    least = cost_of(smallest_shape).effective_gmacs
    return ValueError(
        f"budget of {macs / 1e9:.4g} effective GMACs is out of reach; {least:.4g} is the least"
    )
