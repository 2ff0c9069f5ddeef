from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruners.latency.phases import (
    Keeps,
    Rules,
    phases_of,
    search_phases,
    selector_blocks,
    shares_of,
)

GRID = Rules().grid


def tokens(keeps: Keeps, depth: int, full: int = 100) -> list[int]:
    """Tokens of each block, a package per selector included."""
    counts, ratio = [], 1.0
    for block in range(depth):
        ratio = keeps.get(block, ratio)
        counts.append(round(full * ratio) + sum(b <= block for b in keeps))
    return counts


def linear(depth: int, selector: float = 0.0) -> Callable[[Keeps], float]:
    """Seconds = tokens of all blocks / 100, so that a dense block takes one."""
    return lambda keeps: sum(tokens(keeps, depth)) / 100 + selector * len(keeps)


class Trainer:
    """Accuracy is 80 less what `loss` says; the state is the list of what was trained."""

    def __init__(self, loss: Callable[[Keeps], float]) -> None:
        self.loss = loss

    def __call__(self, state: tuple[Keeps, ...], keeps: Keeps) -> tuple[tuple[Keeps, ...], float]:
        return (*state, dict(keeps)), 80.0 - self.loss(keeps)


def search(loss, latency, limit: float, depth: int = 12, **rules):
    return search_phases(
        (),
        depth=depth,
        limit=limit,
        latency=latency,
        tune=Trainer(loss),
        rules=Rules(**rules),
    )


def is_a_schedule(keeps: Keeps, depth: int, rules: Rules) -> None:
    """Falling with depth, of the grid, phases far enough apart, none in the first quarter."""
    assert list(keeps) == sorted(keeps)
    assert all(block >= depth // 4 and 1 <= block < depth for block in keeps)
    assert all(keep in rules.grid and keep < 1.0 for keep in keeps.values())
    for (_, first), (_, second) in itertools.pairwise(keeps.items()):
        assert first - second >= rules.merge - 1e-9
        assert first > second


def earlier_hurts_more(keeps: Keeps) -> float:
    """Points lost: what is pruned, quadratically, weighted by the blocks that miss it."""
    left = [count / 100 for count in tokens(keeps, 12, full=100)]
    return sum(0.06 * (12 - b) * max(0.0, 1 - r) ** 2 for b, r in enumerate(left))


def test_synthetic_latency_gives_phases_within_the_limit() -> None:
    latency = linear(12, selector=0.02)
    for limit in (11.0, 9.0, 7.5, 6.8):
        found = search(earlier_hurts_more, latency, limit)
        assert found.seconds <= limit
        assert found.seconds == latency(found.keeps)
        assert found.accuracy == 80.0 - earlier_hurts_more(found.keeps)
        is_a_schedule(found.keeps, 12, Rules())
    assert len(found.keeps) > 1


def test_insertion_goes_backwards_and_stops_at_the_limit() -> None:
    seen: list[dict[int, float]] = []

    def loss(keeps: Keeps) -> float:
        seen.append(dict(keeps))
        return 0.4 * (1.0 - min(keeps.values(), default=1.0)) * len(keeps)

    found = search(loss, linear(12), 11.2)
    assert seen[:4] == [{}, {11: 0.9}, {11: 0.8}, {11: 0.7}]
    assert found.keeps == {10: 0.8, 11: 0.3}
    assert linear(12)({10: 0.9, 11: 0.3}) > 11.2
    assert list(found.state) == seen  # all were accepted, and weights are carried on


def test_the_tolerance_is_of_each_insertion_and_counts_from_before_it() -> None:
    seen: list[dict[int, float]] = []

    def loss(keeps: Keeps) -> float:  # a step of 0.1 costs 0.2 points: two fit into 0.5
        seen.append(dict(keeps))
        return 0.2 * sum(round(10 * (1 - keep)) for keep in keeps.values())

    search(loss, linear(12), 11.5)
    assert [k[11] for k in seen if list(k) == [11]] == [0.9, 0.8, 0.7]
    assert seen[4] == {10: 0.9, 11: 0.8}  # 0.7 was undone; 0.4 points are spent, 0.2 more are well
    seen.clear()
    search(loss, linear(12), 11.5, tolerance=0.2)
    assert [k[11] for k in seen if list(k) == [11]] == [0.9, 0.8]


def test_a_ratio_of_a_block_never_falls_below_that_of_the_next() -> None:
    seen: list[dict[int, float]] = []

    def loss(keeps: Keeps) -> float:  # the last block alone needs its tokens
        seen.append(dict(keeps))
        return 1.0 if list(keeps) == [11] and keeps[11] < 0.6 else 0.0

    found = search(loss, linear(12), 9.0)
    assert found.keeps == {4: 0.6}
    assert [min(k.values()) for k in seen if k].count(0.5) == 1
    assert all(list(k.values()) == sorted(k.values(), reverse=True) for k in seen)


def test_beyond_the_tolerance_the_best_gain_per_loss_is_taken() -> None:
    weights = [1.0] * 10 + [3.0, 1.0]

    def latency(keeps: Keeps) -> float:  # the block before the last takes the most time ...
        return sum(w * n for w, n in zip(weights, tokens(keeps, 12), strict=True)) / 100

    def loss(keeps: Keeps) -> float:  # ... and costs the most accuracy
        return 1.0 * (1 - keeps.get(11, 1.0)) if list(keeps) in ([], [11]) else 50.0

    found = search(loss, latency, 13.6, tolerance=0.0)
    assert found.keeps == {11: 0.5}
    alike = search(lambda k: 0.1 * (1 - min(k.values(), default=1.0)), latency, 13.6, tolerance=0.0)
    assert min(alike.keeps) < 11


def test_selectors_that_cost_more_than_they_save_are_dropped() -> None:
    rules = Rules()
    dear, cheap = linear(12, selector=0.5), linear(12, selector=0.02)
    keeps = {9: 0.7, 10: 0.6, 11: 0.3}
    assert phases_of(keeps, cheap, rules) == keeps
    assert phases_of(keeps, dear, rules) == {9: 0.7}
    assert phases_of({11: 0.9}, linear(12, selector=0.2), rules) == {}
    found = search(lambda keeps: 0.0, dear, 9.0)
    for block in found.keeps:
        without = {b: k for b, k in found.keeps.items() if b != block}
        assert dear(without) > dear(found.keeps)


def test_neighbours_merge_into_the_first_ones_ratio() -> None:

    def latency(keeps: Keeps) -> float:  # every selector pays
        return 12.0 - sum(1 - keep for keep in keeps.values())

    keeps = {3: 0.90, 4: 0.86, 5: 0.82, 6: 0.80, 7: 0.60}
    # 0.82 lies within 8.5 % of 0.90, 0.80 does not, though it is near its neighbour.
    assert phases_of(keeps, latency, Rules()) == {3: 0.90, 6: 0.80, 7: 0.60}
    assert phases_of(keeps, latency, Rules(merge=0.0)) == keeps
    assert phases_of({3: 0.9, 4: 0.8}, latency, Rules(merge=0.1)) == {3: 0.9, 4: 0.8}
    assert phases_of({3: 0.7, 4: 0.7}, latency, Rules(merge=0.0)) == {3: 0.7}
    assert phases_of({3: 0.7, 4: 0.9, 5: 0.5}, latency, Rules()) == {3: 0.7, 5: 0.5}


def test_shares_compound_to_the_keep_ratios() -> None:
    shares = shares_of({3: 0.7, 6: 0.49, 9: 0.343})
    assert shares == pytest.approx({3: 0.3, 6: 0.3, 9: 0.3})


@pytest.mark.parametrize(("depth", "first"), [(12, 3), (16, 4), (6, 1), (3, 1), (2, 1)])
def test_the_first_quarter_has_no_selector(depth: int, first: int) -> None:
    assert list(selector_blocks(depth)) == list(range(first, depth))


def test_an_impossible_limit_is_refused_before_anything_is_trained() -> None:
    def loss(keeps: Keeps) -> float:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"limit is 5 s; 5\.79 s is the least"):
        search(loss, linear(12), 5.0)
    with pytest.raises(ValueError, match="limit is nan"):
        search(loss, linear(12), float("nan"))


def test_a_limit_that_the_dense_model_meets_needs_nothing() -> None:
    found = search(lambda keeps: 0.0, linear(12), 12.0)
    assert (found.keeps, found.accuracy, found.state) == ({}, 80.0, ({},))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0.9, 0.5)}, r"grid is \[0.9, 0.5\]"),
        ({"grid": (1.0, 0.5, 0.7)}, "falling from 1"),
        ({"grid": (1.0, 0.0)}, "positive"),
        ({"grid": (1.0,)}, "2 or more"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"merge": 1.0}, "merge is 1.0"),
    ],
)
def test_rules_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(**options)


def table_latency(seconds: list[float], depth: int, selector: float) -> Callable[[Keeps], float]:
    """Seconds of a block by its number of tokens, of 0 to 20."""
    return lambda keeps: (
        sum(seconds[min(20, n)] for n in tokens(keeps, depth, full=16)) + selector * len(keeps)
    )


rows = st.lists(st.floats(0.0, 1.0), min_size=21, max_size=21)


@given(
    steps=rows,
    depth=st.integers(2, 9),
    selector=st.floats(0.0, 0.5),
    share=st.floats(0.1, 1.0),
    drops=st.lists(st.floats(-0.2, 2.0), min_size=7, max_size=7),
    merge=st.sampled_from([0.0, 0.085, 0.25]),
    monotone=st.booleans(),
)
def test_any_schedule_meets_the_limit_or_is_refused(
    steps: list[float],
    depth: int,
    selector: float,
    share: float,
    drops: list[float],
    merge: float,
    monotone: bool,
) -> None:
    seconds = list(itertools.accumulate(steps)) if monotone else steps
    latency = table_latency(seconds, depth, selector)
    rules = Rules(merge=merge)
    limit = share * latency({})

    def loss(keeps: Keeps) -> float:
        return sum(drops[block % 7] * (1 - keep) for block, keep in keeps.items())

    singles = [{block: GRID[-1]} for block in selector_blocks(depth)]
    least = min(latency(keeps) for keeps in [{}, *singles])
    if least > limit:
        with pytest.raises(ValueError, match="within reach"):
            search(loss, latency, limit, depth=depth, merge=merge)
        return
    found = search(loss, latency, limit, depth=depth, merge=merge)
    assert found.seconds == latency(found.keeps) <= limit
    is_a_schedule(found.keeps, depth, rules)
